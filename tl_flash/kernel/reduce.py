"""Reduce screened scores, a piece at a time: block extremes for the selection, sums for the statistics."""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts

LEAST_SUM, GREATEST_SUM = 1e-30, 1e36  # of exponentials that neither lost terms nor came near overflow
_LARGE = 60.0  # scores whose exponentials are taken beside that of the row's greatest
_LEAST_EXPONENT = -80.0  # beside the greatest term; to take the exponential of less is many times slower
_SIGN, _MAGNITUDE, _FINITE = 15, 0x7FFF, 0x7F7F
#   of bfloat16: the place of the sign, the other bits, and those of the greatest finite number


class Reduced(NamedTuple):
    """What a tile's statistics and candidates are made of, in one pass over its scores."""

    extremes: Tensor
    #   [2, n, blocks], greatest score of a reportable token in each block, at pole 1 of the scores' negatives; finite;
    #   as scores are, or for bfloat16 whole numbers; `as_floats` makes it float32
    squares: Tensor
    #   float64 [n], sum over the vocabulary of (score - mean)^2
    fourths: Tensor
    #   float64 [n], of (score - mean)^4
    log_z: Tensor
    #   float64 [2, n], logsumexp of +-slope * (score - mean)
    tilted: Tensor
    #   float64 [2, n], mean of +-(score - mean) by the weights that log_z sums


class Work(NamedTuple):
    """Memory that scores are worked on in, so many at a time."""

    float32: Tensor
    #   for scores in low precision alone
    powers: Tensor
    #   float32
    extremes: Tensor


def reduce(
    scores: Tensor, d_vocab: int, mean: Tensor | None, slope: Tensor | None, never: Tensor | None, work: Work
) -> Reduced:
    """Reduce screened scores, some rows at a time.

    Args:
        scores: float32, bfloat16 or float16 [n, size * blocks]; token t is in block t mod blocks.
        d_vocab: how many are scores of tokens; what lies beyond counts for extremes alone.
        mean: float32 [n, 1], the mean of each row; None where it is 0.
        slope: float32 [n, 1], what log_z multiplies centred scores with; None where no log_z is wanted.
        never: int64, places that no extreme is to be of; None if there are none.
        work: as long as a row of scores at least.
    """
    n, width = scores.shape
    extremes = work.extremes[:, :n]
    sums, shifts = torch.zeros(8, n, dtype=torch.float32, device=scores.device).split([6, 2])
    for rows in parts(n, _even(len(work.powers) // width)):
        some, real, of_some = scores[rows], scores[rows, :d_vocab], sums[:, rows]
        _block_extremes(some, never, work.powers, extremes[:, rows])
        powers = work.powers[: real.numel()].view(real.shape)
        wide = powers if real.dtype == torch.float32 else work.float32[: real.numel()].view(real.shape)
        exact = real if wide is powers else wide.copy_(real)
        if slope is not None:
            if as_floats(extremes[:, rows].amax()) > _LARGE:
                shifts[:, rows] = as_floats(extremes[:, rows].amax(-1))
                _shifted_exp_sums(exact, shifts[:, rows], powers, of_some[2:], tilted=exact is wide)
            else:
                _exp_sums(exact, powers, of_some[2:], tilted=exact is wide)
        _power_sums(exact if mean is None else torch.sub(exact, mean[rows], out=wide), wide, of_some[:2])
    squares, fourths, of_exponentials = sums[0].double(), sums[1].double(), sums[2:].double()
    if slope is None:
        nothing = torch.full_like(of_exponentials[:2], math.nan)
        return Reduced(extremes, squares, fourths, nothing, nothing)
    logs = _log_sums(of_exponentials, shifts, scores[:, :d_vocab], mean, slope)
    return Reduced(extremes, squares, fourths, *logs)


def _even(rows: int) -> int:
    """So many or one less, that two threads share alike."""
    return rows - rows % 2 if rows > 1 else rows


def as_floats(ordered: Tensor) -> Tensor:
    """float32: the scores that whole numbers of `Reduced.extremes` stand for, or that are floats already."""
    if ordered.is_floating_point():
        return ordered.float()
    return (ordered >> _SIGN).bitwise_and_(_MAGNITUDE).bitwise_xor_(ordered).view(torch.bfloat16).float()


def extremes_dtype(dtype: torch.dtype) -> torch.dtype:
    """What extremes of scores of `dtype` are held in.

    bfloat16 is compared several times faster as whole numbers: its bits, where it is negative with all but the sign's
    flipped. To take the complement of such a number is to negate the float.
    """
    return torch.int16 if dtype == torch.bfloat16 else dtype


def _block_extremes(scores: Tensor, never: Tensor | None, work: Tensor, extremes: Tensor) -> None:
    """Write into extremes [2, n, blocks] the greatest of scores [n, size * blocks] in each block, and of its negatives.

    A block of `never` alone has the least finite number. What lies in scores at `never` comes back as it was.
    """
    if scores.dtype == torch.bfloat16:
        bits, finite = scores.view(torch.int16), _FINITE
        least = ~finite
        compared = work.view(torch.int16)[: bits.numel()].view(bits.shape)
        torch.bitwise_right_shift(bits, _SIGN, out=compared).bitwise_and_(_MAGNITUDE).bitwise_xor_(bits)
    else:
        finite = torch.finfo(scores.dtype).max
        compared, least = scores, -finite
    blocks, held = compared.unflatten(1, (-1, extremes.shape[-1])), None
    if never is not None:
        held = compared.index_select(1, never)
        compared.index_fill_(1, never, least)
    torch.amax(blocks, 1, out=extremes[0])
    if never is not None:
        compared.index_fill_(1, never, finite)
    torch.amin(blocks, 1, out=extremes[1])
    extremes[1].bitwise_not_() if scores.dtype == torch.bfloat16 else extremes[1].neg_()
    if never is not None and held is not None:
        compared.index_copy_(1, never, held)


def _power_sums(centred: Tensor, work: Tensor, sums: Tensor) -> None:
    """Write into sums [2, n] those of the squares and of the fourth powers."""
    squares = torch.mul(centred, centred, out=work)
    torch.sum(squares, 1, out=sums[0])
    torch.sum(squares.square_(), 1, out=sums[1])


def _exp_sums(scores: Tensor, work: Tensor, sums: Tensor, *, tilted: bool) -> None:
    """Write into sums [4, n] those of exp(score) and of exp(-score), then of these times the score; one exponential.

    The latter are of use where scores were rounded, and stay as they are elsewhere.
    """
    powers = torch.exp(scores, out=work)
    for at in range(2):
        torch.sum(powers.reciprocal_() if at else powers, 1, out=sums[at])
        if tilted:
            sums[2 + at] = torch.linalg.vecdot(powers, scores)


def _shifted_exp_sums(scores: Tensor, shifts: Tensor, work: Tensor, sums: Tensor, *, tilted: bool) -> None:
    """What `_exp_sums` writes, of +-score - shift, with a shift [2, n] for either sign."""
    for at, shift in enumerate(shifts[..., None]):
        powers = torch.add(scores, shift, out=work).neg_() if at else torch.sub(scores, shift, out=work)
        torch.sum(powers.clamp_(min=_LEAST_EXPONENT).exp_(), 1, out=sums[at])
        if tilted:
            sums[2 + at] = torch.linalg.vecdot(powers, scores)


def _log_sums(
    sums: Tensor, shifts: Tensor, scores: Tensor, mean: Tensor | None, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """float64 [2, n] each: logsumexp of +-slope * (score - mean) over the vocabulary, and their weighted means.

    `sums` [4, n], what `_exp_sums` gives of +-score - shift, serve wherever slope is 1 and nothing came near overflow.
    """
    mean = torch.zeros_like(slope) if mean is None else mean
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, device=scores.device)
    log_z = sums[:2].log() + shifts - signs * mean.T
    tilted = signs * (sums[2:] / sums[:2] - mean.T)
    usable = ((sums[:2] > LEAST_SUM) & (sums[:2] < GREATEST_SUM)).all(0) & (slope[:, 0] == 1)
    for row in (~usable).nonzero():
        centred = signs * (scores[row] - mean[row])
        scaled = centred * slope[row]
        log_z[:, row] = scaled.logsumexp(1, keepdim=True)
        tilted[:, row] = (scaled.softmax(1) * centred).sum(1, keepdim=True)
    return log_z, tilted


def has_triton(device: torch.device) -> bool:
    """Whether triton_kernels takes the place of what is written here in torch."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
