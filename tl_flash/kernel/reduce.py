"""Reduce a tile of screened scores: block extremes for the selection, sums for the statistics."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tl_flash.kernel.unembedding import parts

WORK = 2**18  # scores that are summed at a time, in float32
_WORK_COLUMNS = 2**13
_STEEPEST = 70.0  # exp(70) times any d_vocab is a float32 number, exp(-70) a normal one


class Reduced(NamedTuple):
    """What a tile's statistics and candidates are made of, in one pass over its scores."""

    greatest: Tensor
    #   [2, n, blocks], greatest score of each block, at pole 1 of the scores' negatives
    squares: Tensor
    #   float64 [n], sum over the vocabulary of (score - mean)^2
    fourths: Tensor
    #   float64 [n], of (score - mean)^4
    log_z: Tensor
    #   float64 [2, n], logsumexp of +-slope * (score - mean)


def reduce(scores: Tensor, mean: Tensor, slope: Tensor | None, group: int, work: Tensor) -> Reduced:
    """Reduce screened scores [n, d_vocab].

    Args:
        scores: float32 or bfloat16.
        mean: float32 [n, 1], the mean of each row.
        slope: float32 [n, 1], what log_z multiplies centred scores with; None where no log_z is wanted.
        group: tokens in a block.
        work: float32, any length: sums are made in parts of that many scores, which should fit a core's cache.
    """
    if has_triton(scores.device):
        from tl_flash.kernel import triton_kernels

        return triton_kernels.reduce(scores, mean, slope, group)
    greatest = torch.stack([block_maxima(scores, group), -block_minima(scores, group)])
    squares, fourths = _power_sums(scores, mean, work)
    if slope is None:
        return Reduced(greatest, squares, fourths, torch.full_like(greatest[..., 0], math.nan, dtype=torch.float64))
    return Reduced(greatest, squares, fourths, _log_sums(scores, greatest.amax(2), mean, slope, work))


def _power_sums(scores: Tensor, mean: Tensor, work: Tensor) -> Tensor:
    """float64 [2, n], sums of (score - mean)^2 and of (score - mean)^4."""
    sums = torch.zeros(2, len(scores), dtype=torch.float64, device=scores.device)
    for rows, some, here in _in_cache(scores, work):
        sums[0, rows] += here.copy_(some).sub_(mean[rows]).square_().sum(1)
        sums[1, rows] += here.square_().sum(1)
    return sums


def _log_sums(scores: Tensor, greatest: Tensor, mean: Tensor, slope: Tensor, work: Tensor) -> Tensor:
    """float64 [2, n], logsumexp of +-slope * (score - mean), given the greatest +-score [2, n]."""
    highest = torch.maximum(greatest[0] - mean[:, 0], greatest[1] + mean[:, 0]) * slope[:, 0]
    steep = (highest > _STEEPEST).nonzero()[:, 0]
    sums = torch.zeros(2, len(scores), dtype=torch.float64, device=scores.device)
    for rows, some, here in _in_cache(scores, work):
        here.copy_(some).sub_(mean[rows]).mul_(slope[rows])
        if len(steep):
            here.clamp_(-_STEEPEST, _STEEPEST)
        sums[0, rows] += here.exp_().sum(1)  # one exponential serves both poles
        sums[1, rows] += here.reciprocal_().sum(1)
    log_z = sums.log()
    for rows in steep.split(max(len(work) // scores.shape[1], 1)):
        scaled = (scores[rows] - mean[rows]) * slope[rows]
        log_z[:, rows] = torch.stack([scaled.logsumexp(1), (-scaled).logsumexp(1)]).double()
    return log_z


def _in_cache(scores: Tensor, work: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of scores with their rows, and of `work` in the same shape."""
    for columns in parts(scores.shape[1], min(_WORK_COLUMNS, len(work))):
        for rows in parts(len(scores), len(work) // (columns.stop - columns.start)):
            some = scores[rows, columns]
            yield rows, some, work[: some.numel()].view(some.shape)


def block_maxima(scores: Tensor, group: int) -> Tensor:
    """[n, blocks]: token t is in block t mod blocks, so that the reduction runs along contiguous memory."""
    blocks = -(-scores.shape[1] // group)
    whole = scores.shape[1] // blocks * blocks
    maxima = scores[:, :whole].unflatten(1, (-1, blocks)).amax(1)
    here = maxima[:, : scores.shape[1] - whole]
    torch.maximum(here, scores[:, whole:], out=here)
    return maxima


def block_minima(scores: Tensor, group: int) -> Tensor:
    """[n, blocks], like `block_maxima`."""
    blocks = -(-scores.shape[1] // group)
    whole = scores.shape[1] // blocks * blocks
    minima = scores[:, :whole].unflatten(1, (-1, blocks)).amin(1)
    here = minima[:, : scores.shape[1] - whole]
    torch.minimum(here, scores[:, whole:], out=here)
    return minima


def has_triton(device: torch.device) -> bool:
    """Whether triton_kernels takes the place of what is written here in torch."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
