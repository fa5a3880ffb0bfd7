"""One tile of directions: screen every token, reduce, score the best again in float64, say which rows are proven.

Screened scores are in the units of log_z, tau = sqrt(d_model) / norm, in which a typical one is of the order of 1.
Where a norm of the caller's makes tau extreme they are in other units, so that nothing over- or underflows, whatever
the scale of the direction or of W_U.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts
from tl_flash.kernel.plan import FAN, Plan
from tl_flash.kernel.readout import sort_tokens
from tl_flash.kernel.reduce import Reduced, Work, as_floats, has_triton, ordered_dtype, reduce
from tl_flash.kernel.rescore import Rescorer
from tl_flash.kernel.screens import Screen
from tl_flash.kernel.unembedding import Unembedding

_EXTREME = 1e4  # of a typical score in units of log_z
_FEW = 16  # a row is repaired at once if no more than a token in so many has to be scored again


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
    #   bool [n], nothing is left after centring and gain; such rows are zero, their lengths 1

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
        finite = torch.isfinite(raw)
        zero = (own <= 1e-12 * raw) | ~(length > 0)  # a float64 mean leaves that much of a constant row
        zero = finite & (zero | (given == 0))
        rows = rows.masked_fill(zero[:, None], 0)
        given, length = given.masked_fill(zero, 1), length.masked_fill(zero, 1)
        return cls(rows, rows @ u.mean_column, given, length, finite, zero)


class Top(NamedTuple):
    """The k greatest scores of each row at both poles."""

    ids: Tensor
    #   int64 [2, n, k]
    scores: Tensor
    #   float64 [2, n, k], of x at pole 0, of -x at pole 1, means not taken off
    unproven: Tensor


class Tile:
    """The screened scores of one tile of directions, in buffers that every tile uses again."""

    def __init__(self, plan: Plan, screen: Screen, u: Unembedding, scratch: Tensor, rescorer: Rescorer):
        self.plan, self.u, self.screen, self.rescorer = plan, u, screen, rescorer
        scores, extremes, float32, own, weights = scratch[: plan.buffer_bytes].split(plan.buffers)
        self._scores, self._weights = scores.view(screen.dtype), weights.view(screen.dtype)
        whole = extremes.view(ordered_dtype(screen.dtype))[: 2 * plan.rows * plan.blocks].view(2, -1, plan.blocks)
        self._work = Work(float32.view(torch.float32), own.view(screen.dtype), whole)
        fixed_error = screen.accumulation * screen.reach + screen.residual
        self._fixed_errors = fixed_error, *plan.greatest(fixed_error)  # of tokens, blocks, groups
        self._reaches = screen.reach, *plan.greatest(screen.reach)
        beyond = torch.arange(u.d_vocab, plan.size * plan.blocks, device=u.device)
        never = torch.cat([u.ignored, beyond])
        self._never = never if len(never) else None

    def fill(self, directions: Directions) -> None:
        """Screen every token and reduce the scores."""
        u, d, screen, n = self.u, directions, self.screen, len(directions.rows)
        self.directions = d
        typical = d.length * u.size / d.norm  # score in units of log_z
        held = typical if u.score == "cosine" else typical.clamp(1 / _EXTREME, _EXTREME)
        self.unit = math.sqrt(u.d_model) / (d.length * u.size)  # screened = unit * (score - shift)
        if u.score == "dot":
            self.unit *= held
        self.shift = d.mean if screen.scaled else torch.zeros_like(d.mean)
        self._slope = (typical / held).float()[:, None]
        self._mean = ((d.mean - self.shift) * self.unit).float()[:, None]
        scaled = d.rows * self.unit[:, None]
        rows = scaled.to(screen.dtype)
        self._length = 1.01 * (d.length * self.unit).float()[:, None]  # of a row as screened, at most
        self._lost = torch.zeros_like(self._length)  # length of what rounding took from it, at most
        self._shrunk = torch.ones_like(d.length)  # how much shorter rounding left it
        if screen.dtype != torch.float32:
            self._shrunk = torch.linalg.vector_norm(rows.double(), dim=1) / (d.length * self.unit)
            self._lost = torch.linalg.vector_norm(scaled.sub_(rows), dim=1, keepdim=True).float() * (1 + 1e-6)
        scores = self._scores[: n * self.plan.size * self.plan.blocks].view(n, -1)
        self.scores = scores[:, : u.d_vocab]
        self._multiply(rows)
        slope, mean = None if u.score == "cosine" else self._slope, None if screen.scaled else self._mean
        if has_triton(u.device):
            from tl_flash.kernel import triton_kernels

            never = ~u.reportable if len(u.ignored) else None
            self.reduced = triton_kernels.reduce(self.scores, self._mean, slope, never, self.plan.blocks)
        else:
            self.reduced = reduce(scores, u.d_vocab, mean, slope, self._never, self._work)

    def _multiply(self, rows: Tensor) -> None:
        """Screen every token."""
        for part in parts(self.u.d_vocab, self.plan.columns):
            torch.mm(rows, self._screening_weights(part), out=self.scores[:, part])
            if self.u.column_scale is not None and not self.screen.scaled:
                self.scores[:, part] *= self.u.column_scale[part].float()

    def _screening_weights(self, part: slice) -> Tensor:
        W = self.screen.weights[:, part]
        if W.dtype == self.screen.dtype:
            return W
        held = self._weights[: W.numel()]
        held = held.view(W.shape[::-1]).T if self.u.W_U.stride(0) == 1 else held.view(W.shape)
        return held.copy_(W)

    def statistics(self, top: Top) -> tuple[Tensor, Tensor, Tensor]:
        """Standard deviation and excess kurtosis of the scores [n], and log_z [2, n]."""
        _, squares, fourths, log_z = self.reduced if self.screen.dtype == torch.float32 else self._corrected(top)
        std = (squares / self.u.d_vocab).sqrt() / (self.unit * self._shrunk)
        return std, self.u.d_vocab * fourths / squares.square() - 3, log_z

    def _corrected(self, top: Top) -> Reduced:
        """The sums with the exact scores of the top tokens in place of the screened ones: they weigh most."""
        u, signs = self.u, _signs(self.u.device)
        extremes, squares, fourths, log_z = self.reduced
        mean = signs * self._mean.double()
        exact = self.as_screened(top.scores, signs) - mean
        screened = signs * self.scores.expand(2, -1, -1).gather(-1, top.ids).double() - mean
        if 2 * top.ids.shape[-1] <= u.d_vocab - len(u.ignored):  # no token is at both poles
            right, wrong = exact.square(), screened.square()
            squares = squares + (right - wrong).sum((0, 2))
            fourths = fourths + (right.square() - wrong.square()).sum((0, 2))
        if u.score == "dot":
            slope = self._slope.double()
            rest = 1 - (screened * slope - log_z[..., None]).exp().sum(-1)
            log_z = torch.logaddexp(log_z + rest.clamp(min=0).log(), (exact * slope).logsumexp(-1))
        return Reduced(extremes, squares.clamp(min=0), fourths.clamp(min=0), log_z)

    def top_tokens(self, k: int) -> Top:
        """The k tokens of greatest score at both poles."""
        d, signs = self.directions.rows, _signs(self.u.device)
        tokens, upper, outside = self._candidates()
        best = signs * _both_poles(self.rescorer.of_each(d, _of_rows(tokens[..., :k])))
        kth = self.as_screened(best.amin(-1, keepdim=True), signs)
        hopeless = ~(upper[..., k:] >= kth)
        rest = _both_poles(self.rescorer.of_some(d, _of_rows(tokens[..., k:].masked_fill(hopeless, -1))))
        rest = (signs * rest).masked_fill_(hopeless, -math.inf)
        scores, ids = sort_tokens(torch.cat([best, rest], -1), tokens, k)
        return Top(ids, scores, ~(outside < self.as_screened(scores[..., -1:], signs))[..., 0])

    def as_screened(self, scores: Tensor, signs: Tensor) -> Tensor:
        """Exact scores in the screen's terms."""
        return (scores - signs * self.shift[:, None]) * self.unit[:, None]

    def _candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that may be among the top.

        Returns:
            tokens: [2, n, c], k of them at least reportable.
            upper: float32 [2, n, c], upper bounds on their scores in the screen's terms, descending; -inf for tokens
                that are not reportable.
            outside: [2, n, 1], the greatest upper bound left out.
        """
        u, plan, count = self.u, self.plan, self.plan.candidates
        extremes = self.reduced.extremes
        groups, _, left_groups = _greatest(self._upper(extremes.unflatten(-1, (FAN, -1)).amax(2), 2), count)
        blocks = _members(groups, FAN, plan.blocks // FAN)
        chosen, _, left_blocks = _greatest(self._upper(extremes.gather(-1, blocks), 1, blocks), count)
        tokens = _members(blocks.gather(-1, chosen), plan.size, plan.blocks)
        real = tokens < u.d_vocab
        tokens.clamp_(max=u.d_vocab - 1)
        if len(u.ignored):
            real &= u.reportable[tokens]
        scores = self.scores.expand(2, -1, -1).gather(-1, tokens).mul_(_signs(u.device))
        upper = self._upper(scores.float(), 0, tokens).masked_fill_(~real, -math.inf)
        chosen, upper, left_tokens = _greatest(upper, count, ordered=True)
        return tokens.gather(-1, chosen), upper, torch.maximum(torch.maximum(left_groups, left_blocks), left_tokens)

    def _upper(self, scores: Tensor, level: int, places: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """Bounds that exact scores do not exceed, in the screen's terms.

        Args:
            scores: [..., n, m], float32 or as `Reduced.extremes` are, of some tokens, or of blocks or groups of them.
            level: 0 for tokens, 1 for blocks, 2 for groups.
            places: which of these, [..., n, m]; by default all.
            rows: the tile's, n of them; by default all.
        """
        scores = as_floats(scores, self.screen.dtype)
        fixed, reach = self._fixed_errors[level], self._reaches[level]
        if places is not None:
            fixed, reach = (of_all.expand(*places.shape[:-1], -1).gather(-1, places) for of_all in (fixed, reach))
        error = scores.abs().mul_(self.screen.rounding)
        return error.addcmul_(self._length[rows], fixed).addcmul_(self._lost[rows], reach).add_(scores)

    def repair(self, top: Top, *, at_once: bool) -> None:
        """Score every token that may be among the top k of a row without proof.

        Args:
            top: what `top_tokens` returned, changed in place.
            at_once: leave rows where these are many.
        """
        k, u = top.ids.shape[-1], self.u
        for pole, row in top.unproven.nonzero().tolist():
            tokens = self._reaching(row, pole, top.scores[pole, row, -1])
            if at_once and len(tokens) * _FEW > u.d_vocab:
                continue
            exact = self.rescorer.of_each(self.directions.rows[row, None], tokens[None]) * (1 - 2 * pole)
            scores, ids = sort_tokens(exact, tokens[None], k)
            top.scores[pole, row], top.ids[pole, row], top.unproven[pole, row] = scores[0], ids[0], False

    def _reaching(self, row: int, pole: int, kth: Tensor) -> Tensor:
        """Every reportable token whose bound reaches `kth` [], an exact score: ids [m]."""
        sign = 1 - 2 * pole
        least = (kth - sign * self.shift[row]) * self.unit[row]
        scores = sign * self.scores[row, None].float()
        upper = self._upper(scores, 0, rows=slice(row, row + 1))[0]
        return (~(upper < least) & self.u.reportable).nonzero()[:, 0]


def _of_rows(of_poles: Tensor) -> Tensor:
    """[n, 2 * m] of [2, n, m]: both poles of a row side by side."""
    return of_poles.transpose(0, 1).flatten(1)


def _both_poles(of_rows: Tensor) -> Tensor:
    """The inverse of `_of_rows`."""
    return of_rows.unflatten(1, (2, -1)).transpose(0, 1)


def _signs(device: torch.device) -> Tensor:
    """[2, 1, 1]: the sign of either pole."""
    return (1 - 2 * torch.arange(2, device=device)).view(2, 1, 1)  # made there: a copy would wait for the device


def _members(sets: Tensor, size: int, count: int) -> Tensor:
    """[..., m * size]: what is in sets [..., m] of `count` sets of that size."""
    return (sets[..., None] + torch.arange(0, size * count, count, device=sets.device)).flatten(-2)


def _greatest(values: Tensor, count: int, *, ordered: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Places [..., count] of the greatest values, these values, and a bound [..., 1] on the values left out."""
    if count >= values.shape[-1]:
        best, places = values.sort(-1, descending=True)
        return places, best, torch.full_like(best[..., :1], -math.inf)
    best, places = values.topk(count, sorted=ordered)
    return places, best, best.amin(-1, keepdim=True)
