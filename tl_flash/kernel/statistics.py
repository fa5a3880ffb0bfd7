"""Statistics of a tile's scores over the vocabulary, next to float32's although scores may be rounded.

What a screen in bf16 leaves out is put back in four steps: the tokens that weigh most are exact; those whose columns of
W_U are next to the same, and are rounded alike, get the mean that they have; the rest is scaled to the variance that is
known in closed form, x' C x with C the covariance of W_U's columns; and where what is left of the rounding may show
nevertheless, more tokens are scored again, and then the row in float32. What may show is estimated as if roundings were
independent from token to token. How far the worst rows were off on trained weights: `python -m benchmarks.accuracy`. A
screen in float16, on a GPU, is eight times finer: more tokens are exact at once, and the second step is left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tl_flash.kernel.alike import Alike
from tl_flash.kernel.arithmetic import parts
from tl_flash.kernel.reduce import as_floats
from tl_flash.kernel.tiles import Tile, Top, both_poles, members, of_rows, signs

_FEWEST = 8  # tokens of which some can be told from the rest
_DEEP = 128  # tokens at each pole that are scored again where the statistics ask for it
_GROWN = 0.98, 1.02  # how much longer than screened what is not scored again may turn out to be
_DEEP_BYTES = 2**22  # of scratch, while they are looked for
_TOLERANCE, _DEVIATIONS = 1e-3, (4, 3)  # errors that rounding may leave, and in how many standard deviations


class Statistics(NamedTuple):
    """Spread and tails of each row's scores over the vocabulary."""

    std: Tensor
    #   float64 [n]
    kurtosis: Tensor
    #   float64 [n], excess
    log_z: Tensor
    #   float64 [2, n]


def statistics(tile: Tile, top: Top) -> tuple[Statistics, Tensor]:
    """Spread and tails of the scores over the vocabulary, and which rows a float32 screen should give, bool [n].

    Those of a float32 screen are as good as its sums. Of a screen in low precision the terms of tokens whose scores are
    known exactly take the place of the screened ones, and the rest is scaled to the variance that is known exactly
    too; where the errors of the rest still show, more tokens are scored again.
    """
    if tile.screen.dtype == torch.float32 or tile.u.d_vocab < _FEWEST:
        _, squares, fourths, log_z, _ = tile.reduced
        kurtosis = tile.u.d_vocab * fourths / squares.square() - 3
        std = (squares / tile.u.d_vocab).sqrt() / tile.unit
        return Statistics(std, kurtosis, log_z), torch.zeros_like(tile.directions.zero)
    few = slice(tile.u.d_vocab // 4)  # so that no token is at both poles
    ids, scores = top.known_ids[..., few], top.known[..., few]
    if tile.u.precision == "fast":
        found, _ = _corrected(tile, slice(None), ids, scores, known=None)
        return found, torch.zeros_like(tile.directions.zero)
    variance = _variance(tile)
    found, error = _corrected(tile, slice(None), ids, scores, known=variance)
    again = _DEVIATIONS[0] * error > _TOLERANCE
    if tile.u.device.type != "cpu":  # to look deeper would be to wait for the device
        return found, again
    rows = again.nonzero()[:, 0]
    a_row = 2 * 24 * (tile.plan.blocks + _DEEP * tile.plan.size)
    for some in parts(len(rows), max(_DEEP_BYTES // a_row, 1)):
        ids, level = _deeper(tile, rows[some])
        exact = both_poles(tile.rescorer.of_each(tile.directions.rows[rows[some]], of_rows(ids)))
        better, error = _corrected(tile, rows[some], ids, exact * signs(tile.u.device), variance)
        for of_all, of_some in zip(found, better, strict=True):
            of_all[..., rows[some]] = of_some
        again[rows[some]] = level | (_DEVIATIONS[1] * error > _TOLERANCE)
    return found, again


def _variance(tile: Tile) -> Tensor:
    """Of each row's scores over the vocabulary in the screen's terms, float64 [n]."""
    d = tile.directions
    unit = (d.rows / d.length[:, None]).float()
    return (tile.u.deviations(unit) * d.length * tile.unit).square()


def _deeper(tile: Tile, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The `_DEEP` tokens of greatest screened score at both poles, and whether many share the last one's score.

    Scores that many tokens share are rounded alike, and their errors do not cancel.
    """
    blocks = as_floats(tile.reduced.extremes[:, rows])
    count = min(_DEEP, tile.u.d_vocab // 4)
    _, chosen = blocks.topk(min(count, blocks.shape[-1]), sorted=False)
    tokens = members(chosen, tile.plan.size, tile.plan.blocks)
    beyond = tokens >= tile.u.d_vocab
    tokens.clamp_(max=tile.u.d_vocab - 1)
    scores = tile.scores[rows].expand(2, -1, -1).gather(-1, tokens).mul_(signs(tile.u.device)).float()
    best, places = scores.masked_fill_(beyond, -math.inf).topk(count)
    return tokens.gather(-1, places), (best[..., count // 4] == best[..., -1]).any(0)


def _corrected(
    tile: Tile, rows: slice | Tensor, ids: Tensor, scores: Tensor, known: Tensor | None
) -> tuple[Statistics, Tensor]:
    """Statistics with exact scores [2, n, m] of some tokens in place of the screened ones, and their errors.

    The variance may be known, of all of the tile's rows; else it is the screened scores', which lost what rounding
    took from the length of their row. The errors [n] are of log_z and of kurtosis / (1 + |kurtosis|), the greater:
    a standard deviation of what rounding does to the other tokens, were it independent from token to token.
    """
    u, sign, n_tokens = tile.u, signs(tile.u.device), tile.u.d_vocab
    squares, fourths, log_z, tilted = (of_all[..., rows] for of_all in tile.reduced[1:])
    unit, shift, slope = tile.unit[rows, None], tile.shift[rows, None], tile.slope[rows].double()
    mean = sign * tile.mean[rows].double()
    exact = (scores - sign * shift) * unit - mean
    screened = sign * tile.scores[rows].expand(2, -1, -1).gather(-1, ids).double() - mean
    if known is not None and (alike := u.alike) is not None:
        squares, fourths, log_z = _moved(tile, rows, alike, ids, squares, fourths, log_z)
    right, wrong = exact.square(), screened.square()
    rest = (squares - wrong.sum((0, 2))).clamp(min=torch.finfo(torch.float32).tiny)
    if known is None:
        variance = (rest + right.sum((0, 2))) / n_tokens / tile.kept_length[rows].square()
    else:
        variance = known[rows]
    grown = ((n_tokens * variance - right.sum((0, 2))).clamp(min=0) / rest).sqrt().clamp(*_GROWN)
    left = (fourths - wrong.square().sum((0, 2))).clamp(min=0) * grown.pow(4)
    fourths = left + right.square().sum((0, 2))
    kurtosis = fourths / (n_tokens * variance.square()) - 3
    greatest = exact[..., -1]  # of the rest, but for rounding
    if len(u.ignored):  # which are never among the exact ones
        hidden = tile.scores[rows][:, u.ignored].double()
        greatest = torch.maximum(greatest, torch.stack([hidden.amax(1), -hidden.amin(1)]) - mean[..., 0])
    least = greatest.abs().amax(0)
    noise = _noise(tile, rows, least)
    error = 4 * noise * least * left.sqrt() / (n_tokens * variance.square() * (1 + kurtosis.abs()))
    if u.score == "dot":
        weight = (screened * slope - log_z[..., None]).exp()
        share = (1 - weight.sum(-1)).clamp(min=torch.finfo(torch.float32).tiny)
        steep = (tilted - (weight * screened).sum(-1)) / share * slope[:, 0]
        most = greatest * slope[:, 0]
        tail = log_z + share.log() + torch.minimum(steep.clamp(min=0), most) * (grown - 1)
        tail = torch.minimum(tail, most + math.log(n_tokens))
        log_z = torch.logaddexp(tail, (exact * slope).logsumexp(-1))
        weight_of_least = (most + tail - 2 * log_z).exp()
        error = torch.maximum(error, (noise * slope[:, 0] * weight_of_least.sqrt()).amax(0))
    std = variance.sqrt() / tile.unit[rows]
    return Statistics(std, kurtosis, log_z), error


def _moved(
    tile: Tile, rows: slice | Tensor, alike: Alike, ids: Tensor, squares: Tensor, fourths: Tensor, log_z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of squares and of fourth powers and log_z, where alike tokens, but for ids, have their run's exact mean."""
    squares, fourths, log_z = squares.clone(), fourths.clone(), log_z.clone()
    places, sign = torch.arange(len(tile.scores), device=tile.u.device)[rows], signs(tile.u.device)
    for part in parts(len(places), max(_DEEP_BYTES // (tile.u.d_vocab + 2 * 24 * alike.ids.numel()), 1)):
        some = places[part]
        unit, mean = tile.unit[some, None], tile.mean[some].double()
        exact = (tile.directions.rows[some] @ alike.means - tile.shift[some, None]) * unit - mean
        screened = tile.scores[some[:, None, None], alike.ids].double() - mean[..., None]
        off = exact - screened.mean(2)
        rest = torch.ones(len(some), tile.u.d_vocab, dtype=torch.bool, device=tile.u.device)
        rest = rest.scatter_(1, of_rows(ids[:, part]), False)[:, alike.ids]
        count, first, second, third = ((rest * screened.pow(power)).sum(2) for power in range(4))
        squares[part] += (off * (2 * first + off * count)).sum(1)
        fourths[part] += (off * (4 * third + off * (6 * second + off * (4 * first + off * count)))).sum(1)
        if tile.u.score == "dot":
            slope, log = tile.slope[some].double(), log_z[:, part, None]
            share = (rest * (sign[..., None] * screened * slope[..., None] - log[..., None]).exp()).sum(-1)
            log_z[:, part] += (share * (sign * off * slope).expm1()).sum(-1).clamp(min=-0.5).log1p()
    return squares, fourths, log_z


def _noise(tile: Tile, rows: slice | Tensor, score: Tensor) -> Tensor:
    """Standard deviation of the error of screened scores of this size, [n], were roundings independent."""
    reach, residual = tile.screen.typical_errors
    of_factors = (tile.lost[rows, 0] * reach).square() + (tile.length[rows, 0] * residual).square()
    return (of_factors.double() / tile.u.d_model + (0.3 * tile.screen.rounding * score).square()).sqrt()
