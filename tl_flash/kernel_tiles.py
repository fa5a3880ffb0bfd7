"""One tile of directions: screen every token, reduce, score the best again, prove them, repair what is not proven.

Screened scores are in units in which a typical one is of the order of 1: a direction of length `length` is read as
x * sqrt(d_model) / (length * size), its mean over the vocabulary taken off. So nothing over- or underflows, whatever
the scale of the direction or of W_U.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_flash.kernel_prepare import Unembedding, parts

_GROUP = 16  # tokens in a block; its extremes stand for them until the best blocks are known
_MARGIN = 6  # candidates scored again beyond the k asked for
_ROUNDOFF = 2.0**-24  # of float32


@dataclass(frozen=True)
class Directions:
    """A tile of directions, ready to score: s = rows . W_U (times u.column_scale under "cosine") - mean."""

    rows: Tensor
    #   float64 [n, d_model], gain * x_c (divided by ||x_c|| under "cosine")
    mean: Tensor
    #   float64 [n], mean over the vocabulary
    norm: Tensor
    #   float64 [n], ||x_c||, or what the caller gave in its place
    length: Tensor
    #   float64 [n], length of each of rows

    @classmethod
    def of(cls, x: Tensor, norm: Tensor | None, start: int, u: Unembedding) -> Directions:
        """Centre, apply the gain and measure x [n, d_model]; `start` is the number of its first row, for errors."""
        x = x.detach().to(u.device, torch.float64)
        x_c = x - x.mean(1, keepdim=True) if u.centre else x
        own = torch.linalg.vector_norm(x_c, dim=1)
        rows = x_c if u.gain is None else x_c * u.gain
        if u.score == "cosine":
            rows = rows / own[:, None]
        length = torch.linalg.vector_norm(rows, dim=1)
        _expect_directions(torch.linalg.vector_norm(x, dim=1), own, length, start)
        given = own if norm is None else norm.to(u.device, torch.float64)
        return cls(rows, rows @ u.mean_column, given, length)

    @property
    def poles_mean(self) -> Tensor:
        """float64 [2, n, 1], the mean at either pole."""
        return torch.stack([self.mean, -self.mean])[..., None]


def _expect_directions(raw: Tensor, centred: Tensor, length: Tensor, start: int) -> None:
    finite = torch.isfinite(raw)
    if not finite.all():
        row = start + int((~finite).nonzero()[0])
        raise ValueError(f"x: expected finite directions, got NaN or infinity in row {row}")
    nothing_left = (centred <= 1e-12 * raw) | ~(length > 0)  # what a float64 mean leaves of a constant row
    if nothing_left.any():
        row = start + int(nothing_left.nonzero()[0])
        raise ValueError(
            f"x: expected directions that are not zero (after centring and gain), got a zero one in row {row}; "
            "leave it out"
        )


def exact_scores(rows: Tensor, ids: Tensor, u: Unembedding, pairs: int) -> Tensor:
    """float64 [n, m] scores of each row's own tokens, ids [n, m], means not taken off; `pairs` at a time.

    Every pair is multiplied and summed in the same order, so that equal columns have equal scores.
    """
    scores = torch.empty(ids.shape, dtype=torch.float64, device=u.device)
    for part in parts(len(ids), pairs // max(ids.shape[1], 1)):
        for some in parts(ids.shape[1], pairs):
            wanted = ids[part, some]
            products = u.columns(wanted.flatten()).view(*wanted.shape, u.d_model).mul_(rows[part, None])
            scores[part, some] = products.sum(-1)
    return scores if u.column_scale is None else scores * u.column_scale[ids]


@dataclass(frozen=True)
class Plan:
    """Tile sizes within a byte budget."""

    rows: int
    #   directions in a tile
    columns: int
    #   tokens that one product takes, and one pass of statistics
    pairs: int
    #   (direction, token) pairs scored again at a time

    @classmethod
    def within(cls, max_bytes: int, u: Unembedding, k: int) -> Plan:
        """Share `max_bytes` out.

        Raises:
            ValueError: it does not suffice for one direction.
        """
        a_pair = (8 + 8 + u.W_U.element_size()) * u.d_model
        a_column = 4 * u.d_model * (u.W_U.dtype != torch.float32)  # in float32
        pairs = min(max(max_bytes // (8 * a_pair), 64), 4096)
        columns = min(max(max_bytes // (4 * max(a_column, 1)), 64), 8192, u.d_vocab)
        blocks = 4 * 6 * u.d_vocab / _GROUP
        chosen = 2 * (k + _MARGIN) * _GROUP * 32
        a_row = 4 * u.d_vocab + blocks + chosen + 4 * columns + 36 * u.d_model
        fixed = pairs * a_pair + columns * a_column + 8 * u.d_vocab
        rows = int((max_bytes - fixed) // a_row)
        if rows < 1:
            raise ValueError(
                f"max_bytes: expected at least {math.ceil(fixed + a_row)} for one direction of {u.d_model} against "
                f"{u.d_vocab} tokens, got {max_bytes}; raise it or leave it out"
            )
        return cls(min(rows, 1024), columns, pairs)


class Tile:
    """The screened scores of one tile of directions, in buffers that every tile uses again."""

    def __init__(self, plan: Plan, n: int, u: Unembedding):
        def empty(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=u.device)

        self.plan, self.u = plan, u
        rows = min(plan.rows, n)
        self._scores = empty(rows * u.d_vocab)
        self._part = empty(rows * plan.columns)
        self._weights = empty(u.d_model * plan.columns if u.W_U.dtype != torch.float32 else 0)
        self._reach = u.reach * (1.01 * (u.d_model + 8) * _ROUNDOFF * math.sqrt(u.d_model) / u.size)
        self._block_reach = _block_maxima(self._reach[None])[0]

    def screen(self, directions: Directions) -> None:
        """Score every token in float32, with a bound on what that may be wrong by."""
        u = self.u
        self.directions = directions
        self.unit = math.sqrt(u.d_model) / (directions.length * u.size)  # screened = unit * (score - mean)
        rows = (directions.rows * self.unit[:, None]).float()
        mean = (directions.mean * self.unit).float()[:, None]
        self.scores = self._scores[: len(rows) * u.d_vocab].view(len(rows), u.d_vocab)
        for part in parts(u.d_vocab, self.plan.columns):
            scores = self.scores[:, part]
            torch.mm(rows, self._float32_weights(part), out=scores)
            if u.column_scale is not None:
                scores *= u.column_scale[part].float()
            scores -= mean
        self.high, self.low = _block_maxima(self.scores), _block_minima(self.scores)
        self.top, self.bottom = self.high.amax(1, keepdim=True), self.low.amin(1, keepdim=True)
        largest = torch.maximum(self.top, -self.bottom)
        self.rounding = 8 * _ROUNDOFF * (largest + mean.abs())  # of taking off the mean, and of adding bounds

    def _float32_weights(self, part: slice) -> Tensor:
        W = self.u.W_U[:, part]
        if W.dtype == torch.float32:
            return W
        held = self._weights[: W.numel()]
        held = held.view(W.shape[::-1]).T if self.u.W_U.stride(0) == 1 else held.view(W.shape)
        return held.copy_(W)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Standard deviation and excess kurtosis [n] of the scores, and log_z [2, n]."""
        n, u = len(self.scores), self.u
        squares, fourths = torch.zeros(2, n, dtype=torch.float64, device=u.device)
        sums = torch.zeros(2, n, dtype=torch.float64, device=u.device)
        tau = math.sqrt(u.d_model) / self.directions.norm
        slope = (tau / self.unit).float()[:, None]
        for part in parts(u.d_vocab, self.plan.columns):
            scores = self.scores[:, part]
            work = self._part[: scores.numel()].view(scores.shape)
            squares += torch.mul(scores, scores, out=work).sum(1)
            fourths += work.square_().sum(1)
            if u.score == "dot":  # exp of less than -80 adds nothing, but is slow
                sums[0] += torch.sub(scores, self.top, out=work).mul_(slope).clamp_(min=-80).exp_().sum(1)
                sums[1] += torch.sub(self.bottom, scores, out=work).mul_(slope).clamp_(min=-80).exp_().sum(1)
        std = (squares / u.d_vocab).sqrt() / self.unit
        kurtosis = u.d_vocab * fourths / squares.square() - 3
        extremes = torch.cat([self.top, -self.bottom], 1).T.double() * (tau / self.unit)
        log_z = sums.log() + extremes if u.score == "dot" else torch.full_like(sums, math.nan)
        return std, kurtosis, log_z

    def top_tokens(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k tokens of greatest score at both poles: ids and scores [2, n, k], and which rows took a repair [n]."""
        u, d = self.u, self.directions
        tokens, outside = self._candidates(k)
        n_both = tokens.permute(1, 0, 2).flatten(1)  # [n, 2 * c], so that a row's columns are gathered together
        exact = exact_scores(d.rows, n_both.clamp(min=0), u, self.plan.pairs)
        exact = exact.view(len(exact), 2, -1).permute(1, 0, 2) * _signs(u.device)
        exact, tokens = sort_tokens(exact.masked_fill(tokens < 0, -math.inf), tokens, k)
        kth = (exact[..., -1:] - d.poles_mean) * self.unit[:, None]
        unproven = ~(outside < kth)[..., 0]
        if u.precision == "fast":
            unproven = torch.zeros_like(unproven)
        for pole, row in unproven.nonzero().tolist():
            exact[pole, row], tokens[pole, row] = self._repaired(pole, row, kth[pole, row], k)
        return tokens, exact, unproven.any(0)

    def _candidates(self, k: int) -> tuple[Tensor, Tensor]:
        """Tokens [2, n, c] of greatest upper bound (-1: none), and the greatest upper bound left out [2, n, 1]."""
        u, signs = self.u, _signs(self.u.device)
        if len(u.ignored):
            self.high = _block_maxima(self.scores.index_fill_(1, u.ignored, -math.inf))
            self.low = _block_minima(self.scores.index_fill_(1, u.ignored, math.inf))
        upper = torch.stack([self.high, -self.low]).add_(self._block_reach)
        n_blocks = upper.shape[-1]
        blocks, left_blocks = _greatest(upper, k + _MARGIN)
        tokens = (blocks[..., None] + n_blocks * torch.arange(_GROUP, device=u.device)).flatten(-2)
        real = tokens < u.d_vocab
        tokens.clamp_(max=u.d_vocab - 1)
        real &= u.reportable[tokens]
        scores = self.scores.expand(2, -1, -1).gather(-1, tokens) * signs
        upper = (scores + self._reach[tokens]).masked_fill_(~real, -math.inf)
        chosen, left_tokens = _greatest(upper, k + _MARGIN)
        tokens = tokens.masked_fill_(~real, -1).gather(-1, chosen)
        return tokens, torch.maximum(left_blocks, left_tokens) + self.rounding

    def _repaired(self, pole: int, row: int, kth: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Score again every token that may reach `kth`, itself a lower bound on the k-th score."""
        u, sign = self.u, 1 - 2 * pole
        upper = sign * self.scores[row] + self._reach + self.rounding[row]
        tokens = (~(upper < kth) & u.reportable).nonzero().T  # [1, m]
        exact = exact_scores(self.directions.rows[row, None], tokens, u, self.plan.pairs) * sign
        exact, tokens = sort_tokens(exact, tokens, k)
        return exact[0], tokens[0]


def sort_tokens(scores: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest along the last axis, descending, ties to the lower id: scores and tokens."""
    tokens, order = tokens.sort(-1)
    scores, again = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], tokens.gather(-1, again[..., :k])


def _signs(device: torch.device) -> Tensor:
    """[2, 1, 1]: the sign of either pole."""
    return torch.tensor([1.0, -1.0], device=device).view(2, 1, 1)


def _greatest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places [..., count] of the greatest values, and the greatest value left out [..., 1]."""
    count = min(count, values.shape[-1])
    best, places = values.topk(min(count + 1, values.shape[-1]))
    left = best[..., count:] if best.shape[-1] > count else torch.full_like(best[..., :1], -math.inf)
    return places[..., :count], left


def _block_maxima(scores: Tensor) -> Tensor:
    """[n, blocks]: token t is in block t mod blocks, so the reduction runs along contiguous memory."""
    whole, rest = _in_blocks(scores)
    maxima = whole.amax(1)
    torch.maximum(maxima[:, : rest.shape[1]], rest, out=maxima[:, : rest.shape[1]])
    return maxima


def _block_minima(scores: Tensor) -> Tensor:
    whole, rest = _in_blocks(scores)
    minima = whole.amin(1)
    torch.minimum(minima[:, : rest.shape[1]], rest, out=minima[:, : rest.shape[1]])
    return minima


def _in_blocks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [n, d_vocab] as [n, whole groups, blocks], and what is left of them [n, fewer than blocks]."""
    blocks = -(-scores.shape[1] // _GROUP)
    whole = scores.shape[1] // blocks * blocks
    return scores[:, :whole].unflatten(1, (-1, blocks)), scores[:, whole:]
