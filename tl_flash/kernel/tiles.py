"""One tile of directions: screen every token, reduce, score the best again in float64, say which rows are proven.

Screened scores are in units in which a typical one is of the order of 1: a direction of length `length` is read as
x * sqrt(d_model) / (length * size). So nothing over- or underflows, whatever the scale of the direction or of W_U.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tl_flash.kernel.reduce import WORK, Reduced, block_maxima, block_minima, has_triton, reduce
from tl_flash.kernel.unembedding import Screen, Unembedding, parts

_PAIRS = 256  # scores made again at a time, in float64


@dataclass(frozen=True)
class Directions:
    """A tile of directions, ready to score: s = rows . W_U (times u.column_scale under "cosine") - mean."""

    rows: Tensor
    #   float64 [n, d_model], gain * x_c (divided by ||x_c|| under "cosine")
    mean: Tensor
    #   float64 [n], mean of the scores over the vocabulary
    norm: Tensor
    #   float64 [n], ||x_c||, or what the caller gave in its place
    length: Tensor
    #   float64 [n], length of each of rows
    finite: Tensor
    #   bool [n]
    zero: Tensor
    #   bool [n], nothing is left after centring and gain

    @classmethod
    def of(cls, x: Tensor, norm: Tensor | None, u: Unembedding) -> Directions:
        """Centre, apply the gain and measure x [n, d_model]."""
        x = x.detach().to(u.device, torch.float64)
        raw = torch.linalg.vector_norm(x, dim=1)
        x_c = x - x.mean(1, keepdim=True) if u.centre else x
        own = torch.linalg.vector_norm(x_c, dim=1) if u.centre else raw
        rows = x_c if u.gain is None else x_c * u.gain
        if u.score == "cosine":
            rows = rows / own[:, None]
        length = torch.linalg.vector_norm(rows, dim=1)
        given = own if norm is None else norm.to(u.device, torch.float64, non_blocking=True)
        zero = (own <= 1e-12 * raw) | ~(length > 0)  # a float64 mean leaves that much of a constant row
        return cls(rows, rows @ u.mean_column, given, length, torch.isfinite(raw), zero)


def exact_scores(rows: Tensor, ids: Tensor, u: Unembedding, gathered: int) -> Tensor:
    """float64 [n, m] scores of each row's own tokens, ids [n, m], means not taken off; -inf where an id is -1.

    Columns of W_U are gathered for `gathered` scores at a time, in the order of tokens: that is one walk through W_U
    even where it is held [d_model, d_vocab]. Every score is multiplied and summed in the same order, so that equal
    columns have equal scores.
    """
    if has_triton(u.device):
        from tl_flash.kernel import triton_kernels

        scores = triton_kernels.exact_scores(rows, ids, u.W_U)
        return scores if u.column_scale is None else scores * u.column_scale[ids.clamp(min=0)]
    tokens = ids.flatten()
    places = (tokens >= 0).nonzero()[:, 0]
    places = places[tokens[places].argsort()]
    scores = torch.full(tokens.shape, -math.inf, dtype=torch.float64, device=u.device)
    for part in parts(len(places), gathered):
        columns = u.columns(tokens[places[part]])
        for few in parts(len(columns), _PAIRS):
            here = places[part][few]
            scores[here] = columns[few].double().mul_(rows[here // ids.shape[1]]).sum(-1)
    if u.column_scale is not None:
        scores[places] *= u.column_scale[tokens[places]]
    return scores.view(ids.shape)


@dataclass(frozen=True)
class Plan:
    """Tile sizes within a byte budget."""

    rows: int
    #   directions in a tile
    columns: int
    #   tokens that one product takes
    gathered: int
    #   scores made again at a time, see `exact_scores`
    group: int
    #   tokens in a block; its extremes stand for them until the best blocks are known
    candidates: int
    #   tokens scored again, and blocks looked into, at each pole
    buffers: tuple[int, int, int]
    #   bytes of a tile's scores, of float32 work on them, and of a part of W_U converted

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all three."""
        return sum(self.buffers)

    @classmethod
    def within(cls, max_bytes: int, u: Unembedding, screen: Screen, k: int) -> Plan:
        """Share `max_bytes` out.

        Raises:
            ValueError: it does not suffice for one direction.
        """
        group = 64 if has_triton(u.device) else 16
        candidates = _candidates_needed(u, screen, k)
        # Bytes of a column of W_U gathered and turned, of one converted to the screen's dtype, ...
        a_pair = 2 * u.W_U.element_size() * u.d_model
        a_column = screen.dtype.itemsize * u.d_model * (screen.weights.dtype != screen.dtype)
        gathered = min(max(max_bytes // (16 * a_pair), 64), 4096)
        columns = min(max(max_bytes // (8 * a_column), 64), u.d_vocab) if a_column else u.d_vocab
        # ... of a row's scores, of its blocks with their bounds, of the tokens in its best blocks, of itself.
        row, work = screen.dtype.itemsize * round_up(u.d_vocab), min(4 * WORK, round_up(max_bytes // 16))
        a_row = row + 7 * 4 * u.d_vocab / group + 32 * 2 * candidates * group + 36 * u.d_model
        fixed = work + gathered * a_pair + 16 * _PAIRS * u.d_model + columns * a_column + 8 * u.d_vocab
        rows = int((max_bytes - fixed) // a_row)
        if rows < 1:
            raise ValueError(
                f"max_bytes: expected at least {math.ceil(fixed + a_row)} for one direction of {u.d_model} against "
                f"{u.d_vocab} tokens, got {max_bytes}; raise it or leave it out"
            )
        rows = min(rows, 1024 if u.device.type == "cpu" else 4096)
        return cls(rows, columns, gathered, group, candidates, (rows * row, work, round_up(columns * a_column)))


def _candidates_needed(u: Unembedding, screen: Screen, k: int) -> int:
    """How many tokens cannot be told from the top k, in all but few rows, were scores normally distributed.

    In units of the scores' standard deviation the k-th is near sqrt(2 log(d_vocab / k)), where their density falls by
    a factor of e over the inverse of that, and the bounds on errors are about sqrt(d_model) times the relative ones.
    """
    kth = math.sqrt(2 * math.log(u.d_vocab / k))
    of_rows = 0.42 * screen.rounding  # root mean square of what rounding takes from a number, beside it
    of_weights = (screen.residual.mean() / screen.reach.mean().clamp(min=1e-30)).item()
    error = math.sqrt(u.d_model) * (of_rows + of_weights + screen.accumulation) + screen.rounding * kth
    mixed_in = k * math.expm1(min(kth * error, 4))
    return math.ceil(k + mixed_in + 3 * math.sqrt(mixed_in) + 4)


class Top(NamedTuple):
    """The k greatest scores of each row at both poles."""

    ids: Tensor
    #   int64 [2, n, k]
    scores: Tensor
    #   float64 [2, n, k], of x at pole 0, of -x at pole 1, means not taken off
    unproven: Tensor
    #   bool [2, n]


class Tile:
    """The screened scores of one tile of directions, in buffers that every tile uses again."""

    def __init__(self, plan: Plan, screen: Screen, u: Unembedding, scratch: Tensor):
        self.plan, self.u, self.screen = plan, u, screen
        buffers = scratch[: plan.buffer_bytes].split(plan.buffers)
        self._scores, self._work, self._weights = map(Tensor.view, buffers, (screen.dtype, torch.float32, screen.dtype))
        unit_length = 1.01 * math.sqrt(u.d_model) / u.size  # of a row as screened
        self._fixed_error = unit_length * (screen.accumulation * screen.reach + screen.residual)
        self._block_fixed_error = block_maxima(self._fixed_error[None], plan.group)[0]
        self._block_reach = block_maxima(screen.reach[None], plan.group)[0]

    def fill(self, directions: Directions) -> None:
        """Screen every token and reduce the scores."""
        u, d = self.u, directions
        self.directions = d
        self.unit = math.sqrt(u.d_model) / (d.length * u.size)  # screened = unit * (score - shift)
        self.shift = d.mean if self.screen.scaled else torch.zeros_like(d.mean)
        scaled = d.rows * self.unit[:, None]
        rows = scaled.to(self.screen.dtype)
        self._lost = torch.zeros(len(rows), 1, device=u.device)  # length of what rounding took from each row
        if self.screen.dtype != torch.float32:
            self._lost = torch.linalg.vector_norm(scaled.sub_(rows), dim=1, keepdim=True).float() * (1 + 1e-6)
        self.scores = self._scores.view(self.plan.rows, -1)[: len(rows), : u.d_vocab]
        for part in parts(u.d_vocab, self.plan.columns):
            torch.mm(rows, self._screening_weights(part), out=self.scores[:, part])
            if u.column_scale is not None and not self.screen.scaled:
                self.scores[:, part] *= u.column_scale[part].float()
        mean = ((d.mean - self.shift) * self.unit).float()[:, None]
        slope = None if u.score == "cosine" else (math.sqrt(u.d_model) / (d.norm * self.unit)).float()[:, None]
        self.reduced = reduce(self.scores, mean, slope, self.plan.group, self._work)

    def _screening_weights(self, part: slice) -> Tensor:
        W = self.screen.weights[:, part]
        if W.dtype == self.screen.dtype:
            return W
        held = self._weights[: W.numel()]
        held = held.view(W.shape[::-1]).T if self.u.W_U.stride(0) == 1 else held.view(W.shape)
        return held.copy_(W)

    def statistics(self, top: Top) -> tuple[Tensor, Tensor, Tensor]:
        """Standard deviation and excess kurtosis of the scores [n], and log_z [2, n]."""
        u, reduced = self.u, self.reduced
        if self.screen.dtype != torch.float32:
            reduced = self._corrected(top)
        std = (reduced.squares / u.d_vocab).sqrt() / self.unit
        kurtosis = u.d_vocab * reduced.fourths / reduced.squares.square() - 3
        return std, kurtosis, reduced.log_z

    def _corrected(self, top: Top) -> Reduced:
        """The sums with the exact scores of the top tokens in place of the screened ones: they weigh most."""
        u, d, signs = self.u, self.directions, _signs(self.u.device)
        squares, fourths, log_z = self.reduced.squares, self.reduced.fourths, self.reduced.log_z
        mean = signs * ((d.mean - self.shift) * self.unit)[:, None]
        exact = self.as_screened(top.scores, signs) - mean
        screened = signs * self.scores.expand(2, -1, -1).gather(-1, top.ids).double() - mean
        if 2 * top.ids.shape[-1] <= u.d_vocab - len(u.ignored):  # no token is at both poles
            right, wrong = exact.square(), screened.square()
            squares = squares + (right - wrong).sum((0, 2))
            fourths = fourths + (right.square() - wrong.square()).sum((0, 2))
        if u.score == "dot":
            slope = (math.sqrt(u.d_model) / (d.norm * self.unit))[:, None]
            rest = 1 - (screened * slope - log_z[..., None]).exp().sum(-1)
            log_z = torch.logaddexp(log_z + rest.clamp(min=0).log(), (exact * slope).logsumexp(-1))
        return Reduced(self.reduced.greatest, squares.clamp(min=0), fourths.clamp(min=0), log_z)

    def top_tokens(self, k: int) -> Top:
        """The k tokens of greatest score at both poles."""
        u, d, signs = self.u, self.directions, _signs(self.u.device)
        tokens, outside = self._candidates(k)
        of_row = tokens.transpose(0, 1).flatten(1)  # both poles of a row together
        exact = exact_scores(d.rows, of_row, u, self.plan.gathered)
        exact = exact.unflatten(1, (2, -1)).transpose(0, 1) * signs
        scores, ids = sort_tokens(exact.masked_fill(tokens < 0, -math.inf), tokens, k)
        kth = self.as_screened(scores[..., -1:], signs)
        return Top(ids, scores, ~(outside < kth)[..., 0])

    def as_screened(self, scores: Tensor, signs: Tensor) -> Tensor:
        """Exact scores in the screen's terms."""
        return (scores - signs * self.shift[:, None]) * self.unit[:, None]

    def _candidates(self, k: int) -> tuple[Tensor, Tensor]:
        """Tokens [2, n, c] that may be among the top k (-1: none), and the greatest upper bound left out [2, n, 1]."""
        u, plan = self.u, self.plan
        greatest = self.reduced.greatest
        if len(u.ignored):
            greatest = greatest.clone()
            greatest[0] = block_maxima(self.scores.index_fill_(1, u.ignored, -math.inf), plan.group)
            greatest[1] = -block_minima(self.scores.index_fill_(1, u.ignored, math.inf), plan.group)
        upper = self._error(greatest, self._lost, self._block_reach, self._block_fixed_error).add_(greatest)
        n_blocks = upper.shape[-1]
        blocks, left_blocks = _greatest(upper, plan.candidates)
        tokens = (blocks[..., None] + n_blocks * torch.arange(plan.group, device=u.device)).flatten(-2)
        real = tokens < u.d_vocab
        tokens.clamp_(max=u.d_vocab - 1)
        real &= u.reportable[tokens]
        scores = (self.scores.expand(2, -1, -1).gather(-1, tokens) * _signs(u.device)).float()
        error = self._error(scores, self._lost, self.screen.reach[tokens], self._fixed_error[tokens])
        chosen, left_tokens = _greatest((scores + error).masked_fill_(~real, -math.inf), plan.candidates)
        tokens, real, scores, error = (t.gather(-1, chosen) for t in (tokens, real, scores, error))
        kth_lower = (scores - error).masked_fill_(~real, -math.inf).topk(k).values[..., -1:]
        real &= scores + error >= kth_lower
        return tokens.masked_fill_(~real, -1), torch.maximum(left_blocks, left_tokens)

    def _error(self, scores: Tensor, lost: Tensor, reach: Tensor, fixed_error: Tensor) -> Tensor:
        """Bounds on how far screened scores are from the exact ones."""
        return scores.abs().float().mul_(self.screen.rounding).add_(fixed_error).addcmul_(lost, reach)

    def reaching(self, row: int, pole: int, kth: Tensor) -> Tensor:
        """Every reportable token whose bound reaches `kth` [], an exact score: ids [m]."""
        sign = 1 - 2 * pole
        least = (kth - sign * self.shift[row]) * self.unit[row]
        scores = sign * self.scores[row]
        upper = self._error(scores, self._lost[row], self.screen.reach, self._fixed_error).add_(scores)
        return (~(upper < least) & self.u.reportable).nonzero()[:, 0]


def round_up(size: int) -> int:
    """The next multiple of 64: rows so long start where vector units like it."""
    return -(-size // 64) * 64


def sort_tokens(scores: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest along the last axis, descending, ties to the lower id: scores and tokens."""
    tokens, order = tokens.sort(-1)
    scores, again = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], tokens.gather(-1, again[..., :k])


def _signs(device: torch.device) -> Tensor:
    """[2, 1, 1]: the sign of either pole."""
    return (1 - 2 * torch.arange(2, device=device)).view(2, 1, 1)  # made there: a copy would wait for the device


def _greatest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places [..., count] of the greatest values, and the greatest value left out [..., 1]."""
    count = min(count, values.shape[-1])
    best, places = values.topk(min(count + 1, values.shape[-1]))
    left = best[..., count:] if best.shape[-1] > count else torch.full_like(best[..., :1], -math.inf)
    return places[..., :count], left
