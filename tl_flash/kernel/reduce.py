"""Reduce screened scores, a piece at a time: block extremes for the selection, sums for the statistics."""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts

LEAST_SUM, GREATEST_SUM = 1e-30, 1e36  # of exponentials that neither lost terms nor came near overflow
_ORDER = {
    torch.bfloat16: (torch.int16, 15, 0x7FFF, 0x7F7F),
    torch.float32: (torch.int32, 31, 0x7FFFFFFF, 0x7F7FFFFF),
}
#   the whole number as wide, the place of the sign, the other bits, and those of the greatest finite number


class Reduced(NamedTuple):
    """What a tile's statistics and candidates are made of, in one pass over its scores."""

    extremes: Tensor
    #   [2, n, blocks], greatest score of a reportable token in each block, at pole 1 of the scores' negatives; finite;
    #   float32, or whole numbers that `as_floats` turns into it
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
    powers: Tensor
    #   float32
    extremes: Tensor


def reduce(
    scores: Tensor, d_vocab: int, mean: Tensor | None, slope: Tensor | None, never: Tensor | None, work: Work
) -> Reduced:
    """Reduce screened scores, some rows at a time.

    Args:
        scores: float32 or bfloat16 [n, size * blocks]; token t is in block t mod blocks.
        d_vocab: how many are scores of tokens; what lies beyond is anything.
        mean: float32 [n, 1], the mean of each row; None where it is 0.
        slope: float32 [n, 1], what log_z multiplies centred scores with; None where no log_z is wanted.
        never: int64, tokens that no extreme is to be of, with those from d_vocab on; None if there are none.
        work: as long as a row of scores at least.
    """
    n, width = scores.shape
    blocks = work.extremes.shape[-1]
    extremes = work.extremes[:, :n]
    sums = torch.zeros(6, n, dtype=torch.float64, device=scores.device)
    for rows in parts(n, len(work.powers) // width):
        ordered = _ordered(scores[rows], work.powers).unflatten(1, (-1, blocks))
        _block_extremes(ordered, never, scores.dtype, extremes[:, rows])
        real = scores[rows, :d_vocab]
        wide = work.float32[: real.numel()].view(real.shape)
        if slope is not None:
            exact = real if real.dtype == torch.float32 else wide.copy_(real)
            sums[2:, rows] = _exp_sums(exact, work.powers[: real.numel()].view(real.shape), tilted=exact is wide)
        sums[0, rows], sums[1, rows] = _power_sums(
            wide.copy_(real) if mean is None else torch.sub(real, mean[rows], out=wide)
        )
    if slope is None:
        nothing = torch.full_like(sums[2:4], math.nan)
        return Reduced(extremes, sums[0], sums[1], nothing, nothing)
    return Reduced(extremes, sums[0], sums[1], *_log_sums(sums[2:], scores[:, :d_vocab], mean, slope))


def _ordered(scores: Tensor, work: Tensor) -> Tensor:
    """Whole numbers in the order of the scores: they are compared several times faster.

    They are the floats' bits, where a float is negative with all bits but the sign's flipped. To take the complement of
    such a number is to negate the float.
    """
    whole, sign, magnitude, _ = _ORDER[scores.dtype]
    bits = scores.view(whole)
    ordered = work.view(whole)[: bits.numel()].view(bits.shape)
    return torch.bitwise_right_shift(bits, sign, out=ordered).bitwise_and_(magnitude).bitwise_xor_(bits)


def as_floats(ordered: Tensor, dtype: torch.dtype) -> Tensor:
    """float32: the scores, once of `dtype`, that whole numbers of `Reduced.extremes` stand for."""
    if ordered.is_floating_point():
        return ordered
    _, sign, magnitude, _ = _ORDER[dtype]
    return (ordered >> sign).bitwise_and_(magnitude).bitwise_xor_(ordered).view(dtype).float()


def ordered_dtype(dtype: torch.dtype) -> torch.dtype:
    """The whole numbers that stand for scores of `dtype`."""
    return _ORDER[dtype][0]


def _block_extremes(ordered: Tensor, never: Tensor | None, dtype: torch.dtype, extremes: Tensor) -> None:
    """Write into extremes [2, n, blocks] the greatest along axis 1 of ordered [n, size, blocks], and of its negatives.

    A block of `never` alone has the least finite number.
    """
    finite = _ORDER[dtype][3]
    if never is not None:
        ordered.flatten(1).index_fill_(1, never, ~finite)
    torch.amax(ordered, 1, out=extremes[0])
    if never is not None:
        ordered.flatten(1).index_fill_(1, never, finite)
    torch.amin(ordered, 1, out=extremes[1]).bitwise_not_()


def _power_sums(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the squares and of the fourth powers, float32 [n] each; written over."""
    squares = centred.square_().sum(1)
    return squares, centred.square_().sum(1)


def _exp_sums(scores: Tensor, work: Tensor, *, tilted: bool) -> Tensor:
    """Sums of exp(score) and of exp(-score), then of these times the score, float32 [4, n], from one exponential.

    The latter are of use where scores were rounded, and zero elsewhere.
    """
    powers = torch.exp(scores, out=work)
    above, above_tilted = powers.sum(1), torch.linalg.vecdot(powers, scores) if tilted else None
    below = powers.reciprocal_().sum(1)
    if above_tilted is None:
        return torch.stack([above, below, torch.zeros_like(above), torch.zeros_like(above)])
    return torch.stack([above, below, above_tilted, torch.linalg.vecdot(powers, scores)])


def _log_sums(sums: Tensor, scores: Tensor, mean: Tensor | None, slope: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [2, n] each: logsumexp of +-slope * (score - mean) over the vocabulary, and their weighted means.

    `sums` [4, n], what `_exp_sums` gives, serve wherever slope is 1 and nothing came near overflow.
    """
    mean = torch.zeros_like(slope) if mean is None else mean
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, device=scores.device)
    log_z = sums[:2].log() - signs * mean.T
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
