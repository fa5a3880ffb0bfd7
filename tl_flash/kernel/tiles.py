"""One tile of directions: screen every token, reduce, score the best again in float64, say which rows are proven.

Screened scores are in the units of log_z, tau = sqrt(d_model) / norm, in which a typical one is of the order of 1.
Where a norm of the caller's makes tau extreme they are in other units, so that nothing over- or underflows, whatever
the scale of the direction or of W_U.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts
from tl_flash.kernel.directions import Directions
from tl_flash.kernel.measures import fuses
from tl_flash.kernel.plan import FAN, Plan
from tl_flash.kernel.readout import sort_tokens
from tl_flash.kernel.reduce import Work, as_floats, extremes_dtype, has_triton, reduce
from tl_flash.kernel.rescore import Rescorer
from tl_flash.kernel.screens import Screen
from tl_flash.kernel.unembedding import Unembedding

_SAME = 1e-6  # of the length of a direction times that of a typical column: means that differ less are the same
_EXTREME, _LEAST_FLOAT16 = 1e4, 1 / 16  # of a typical score in units of log_z
_FEW = 16  # a row is repaired at once if no more than a token in so many has to be scored again


class Top(NamedTuple):
    """The k greatest scores of each row at both poles."""

    ids: Tensor
    #   int64 [2, n, k]
    scores: Tensor
    #   float64 [2, n, k], of x at pole 0, of -x at pole 1, means not taken off
    unproven: Tensor
    #   bool [2, n], whether other tokens may belong to them
    known_ids: Tensor
    #   int64 [2, n, m], tokens whose scores are known, these among them
    known: Tensor
    #   float64 [2, n, m], descending


class Tile:
    """The screened scores of one tile of directions, in buffers that every tile uses again."""

    def __init__(self, plan: Plan, screen: Screen, u: Unembedding, scratch: Tensor, rescorer: Rescorer):
        self.plan, self.u, self.screen, self.rescorer = plan, u, screen, rescorer
        scores, extremes, float32, powers, weights = scratch[: plan.buffer_bytes].split(plan.buffers)
        self._scores, self._weights = scores.view(screen.dtype), weights.view(screen.dtype)
        self._triton = has_triton(u.device)
        if not self._triton:
            whole = extremes.view(extremes_dtype(screen.dtype))[: 2 * plan.rows * plan.blocks].view(2, -1, plan.blocks)
            self._work = Work(float32.view(torch.float32), powers.view(torch.float32), whole)

    @cached_property
    def _mates(self) -> Tensor:
        """For each place beyond the vocabulary the first of its block, whose extremes it leaves alone."""
        return torch.arange(self.u.d_vocab, self.plan.size * self.plan.blocks, device=self.u.device) % self.plan.blocks

    @cached_property
    def _never(self) -> Tensor | None:
        """Places that no extreme may be of."""
        beyond = torch.arange(self.u.d_vocab, self.plan.size * self.plan.blocks, device=self.u.device)
        alone = (self._mates >= self.u.d_vocab) | torch.isin(self._mates, self.u.ignored)
        never = torch.cat([self.u.ignored, beyond[alone]])
        return never if len(never) else None

    @cached_property
    def _named(self) -> Tensor | None:
        """Which places an extreme may be of, where not all tokens are reportable."""
        beyond = self.plan.size * self.plan.blocks - self.u.d_vocab
        return torch.nn.functional.pad(self.u.reportable, (0, beyond)) if len(self.u.ignored) else None

    @cached_property
    def _fixed_errors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Errors for each unit of a row's length, whatever the score: of tokens, blocks, groups."""
        errors = self.screen.accumulation * self.screen.reach
        if self.screen.residual is not None:
            errors += self.screen.residual
        return errors, *self.plan.greatest(errors)

    @cached_property
    def _reaches(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths of columns at most: of tokens, blocks, groups."""
        return self.screen.reach, *self.plan.greatest(self.screen.reach)

    @cached_property
    def _room(self) -> float:
        """In units of log_z, how far a typical score may lie from 0 for every score to stay in the screen's range."""
        if self.screen.dtype != torch.float16:
            return math.inf
        longest = self.screen.longest / self.u.size
        return self.screen.greatest / (1.1 * math.sqrt(self.u.d_model) * longest) if longest else math.inf

    def fill(self, directions: Directions) -> None:
        """Screen every token and reduce the scores."""
        u, d, screen, n = self.u, directions, self.screen, len(directions.rows)
        self.directions = d
        typical = d.length * u.size / d.norm  # score in units of log_z
        least, highest = (_LEAST_FLOAT16 if screen.dtype == torch.float16 else 1 / _EXTREME), min(_EXTREME, self._room)
        held = typical if u.score == "cosine" else typical.clamp(min(least, highest), highest)
        self.unit = math.sqrt(u.d_model) / (d.length * u.size)  # screened = unit * (score - shift)
        self.unit *= held if u.score == "dot" else min(1.0, self._room)
        self.slope = (typical / held).float()[:, None]
        scaled = d.rows * (self.unit / screen.power)[:, None]
        rows = scaled.clamp(-screen.greatest, screen.greatest).to(screen.dtype)
        self.length = 1.01 * (d.length * self.unit).float()[:, None]  # of a row as screened, at most
        self.lost = torch.zeros_like(self.length)  # length of what rounding took from it, at most
        if screen.dtype != torch.float32:
            self._rounded = rows
            lost = scaled.sub_(rows)
            self.lost = (torch.linalg.vector_norm(lost, dim=1, keepdim=True) * screen.power).float() * (1 + 1e-6)
            if screen.main is not None:
                rows = torch.cat([rows, (lost.float() @ screen.main).to(screen.dtype)], dim=1)
                self.lost *= 1.02  # of what is made up for, its own roundings
        scores = self._padded = self._scores[: n * self.plan.size * self.plan.blocks].view(n, -1)
        self.scores = scores[:, : u.d_vocab]
        self._multiply(rows)
        if not u.kept.summed and not self._as_measured():
            u.kept.found.clear()
            for holder, stale in ((self, "_fixed_errors"), (self, "_reaches"), (screen, "typical_errors"), (d, "mean")):
                holder.__dict__.pop(stale, None)
        self.shift = d.mean if screen.scaled else torch.zeros_like(d.mean)
        self.mean = ((d.mean - self.shift) * self.unit).float()[:, None]
        slope, mean = None if u.score == "cosine" else self.slope, None if screen.scaled else self.mean
        if self._triton:
            from tl_flash.kernel import triton_kernels

            self.reduced = triton_kernels.reduce(scores, u.d_vocab, self.plan.blocks, self.mean, slope, self._named)
        else:
            scores[:, u.d_vocab :] = scores[:, self._mates]
            self.reduced = reduce(scores, u.d_vocab, mean, slope, self._never, self._work)

    @property
    def kept_length(self) -> Tensor:
        """Length of rows as they were rounded, over what it was, float64 [n]."""
        kept = torch.linalg.vector_norm(self._rounded.double(), dim=1) * self.screen.power
        return kept / (self.directions.length * self.unit)

    def _as_measured(self) -> bool:
        """Whether the mean of the scores is that of W_U as it was measured: rounding moves it by far less."""
        off = self.scores.mean(1, dtype=torch.float64) - self.directions.mean * self.unit
        return bool((off.abs() <= _SAME * self.screen.typical_errors[0] * self.length[:, 0]).all())

    def _multiply(self, rows: Tensor) -> None:
        """Screen every token; of an unembedding that was not measured yet measure it meanwhile."""
        if not self.u.measured and fuses(self.u.W_U, len(rows)):
            return self.u.measure_with(rows, self.scores)
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

    def top_tokens(self, k: int) -> Top:
        """The k tokens of greatest score at both poles."""
        d, sign = self.directions.rows, signs(self.u.device)
        tokens, upper, outside = self._candidates()
        if self._triton:
            scores = sign * both_poles(self.rescorer.of_each(d, of_rows(tokens)))
            known, ids = sort_tokens(scores.masked_fill_(upper == -math.inf, -math.inf), tokens, tokens.shape[-1])
            unproven = ~(outside < self.as_screened(known[..., k - 1 : k], sign))[..., 0]
            few = slice(None) if self._all_known else slice(k)
            return Top(ids[..., :k], known[..., :k], unproven, ids[..., few], known[..., few])
        best = sign * both_poles(self.rescorer.of_each(d, of_rows(tokens[..., :k])))
        kth = self.as_screened(best.amin(-1, keepdim=True), sign)
        hopeless = ~(upper[..., k:] >= kth)
        rest = both_poles(self.rescorer.of_some(d, of_rows(tokens[..., k:].masked_fill(hopeless, -1))))
        rest = (sign * rest).masked_fill_(hopeless, -math.inf)
        scores, ids = sort_tokens(torch.cat([best, rest], -1), tokens, k)
        unproven = ~(outside < self.as_screened(scores[..., -1:], sign))[..., 0]
        return Top(ids, scores, unproven, ids, scores)

    @property
    def _all_known(self) -> bool:
        """Whether there are so many reportable tokens that all candidates are, wherever these lie."""
        return self.u.d_vocab - len(self.u.ignored) >= self.plan.candidates * self.plan.size

    def as_screened(self, scores: Tensor, sign: Tensor) -> Tensor:
        """Exact scores in the screen's terms."""
        return (scores - sign * self.shift[:, None]) * self.unit[:, None]

    def _candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that may be among the top.

        Returns:
            tokens: [2, n, c], k of them at least reportable.
            upper: float32 [2, n, c], upper bounds on their scores in the screen's terms, descending; -inf for tokens
                that are not reportable.
            outside: [2, n, 1], the greatest upper bound left out.
        """
        u, plan, count = self.u, self.plan, self.plan.candidates
        if self._triton:
            from tl_flash.kernel import triton_kernels

            if triton_kernels.selects(plan.blocks, count):
                fixed, reach = self._fixed_errors[:2], self._reaches[:2]
                return triton_kernels.select(
                    self._padded, u.d_vocab, self.reduced.extremes, fixed, reach, self.length, self.lost,
                    self._named, count, self.screen.rounding, self.screen.underflow,
                )  # fmt: skip
        extremes = self.reduced.extremes
        groups, _, left_groups = _greatest(self._upper(extremes.unflatten(-1, (FAN, -1)).amax(2), 2), count)
        blocks = members(groups, FAN, plan.blocks // FAN)
        chosen, _, left_blocks = _greatest(self._upper(extremes.gather(-1, blocks), 1, blocks), count)
        tokens = members(blocks.gather(-1, chosen), plan.size, plan.blocks)
        real = tokens < u.d_vocab
        tokens.clamp_(max=u.d_vocab - 1)
        if len(u.ignored):
            real &= u.reportable[tokens]
        scores = self.scores.expand(2, -1, -1).gather(-1, tokens).mul_(signs(u.device))
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
        scores = as_floats(scores)
        fixed, reach = self._fixed_errors[level], self._reaches[level]
        if places is not None:
            fixed, reach = (of_all.expand(*places.shape[:-1], -1).gather(-1, places) for of_all in (fixed, reach))
        error = scores.abs().mul_(self.screen.rounding).add_(self.screen.underflow)
        return error.addcmul_(self.length[rows], fixed).addcmul_(self.lost[rows], reach).add_(scores)

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


def of_rows(of_poles: Tensor) -> Tensor:
    """[n, 2 * m] of [2, n, m]: both poles of a row side by side."""
    return of_poles.transpose(0, 1).flatten(1)


def both_poles(of_rows: Tensor) -> Tensor:
    """The inverse of `_of_rows`."""
    return of_rows.unflatten(1, (2, -1)).transpose(0, 1)


def signs(device: torch.device) -> Tensor:
    """[2, 1, 1]: the sign of either pole."""
    return (1 - 2 * torch.arange(2, device=device)).view(2, 1, 1)  # made there: a copy would wait for the device


def members(sets: Tensor, size: int, count: int) -> Tensor:
    """[..., m * size]: what is in sets [..., m] of `count` sets of that size."""
    return (sets[..., None] + torch.arange(0, size * count, count, device=sets.device)).flatten(-2)


def _greatest(values: Tensor, count: int, *, ordered: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Places [..., count] of the greatest values, these values, and a bound [..., 1] on the values left out."""
    if count >= values.shape[-1]:
        best, places = values.sort(-1, descending=True)
        return places, best, torch.full_like(best[..., :1], -math.inf)
    best, places = values.topk(count, sorted=ordered)
    return places, best, best.amin(-1, keepdim=True)
