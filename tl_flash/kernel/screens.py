"""Screens: the matrix that every score is first multiplied with, in a precision that pays, and how far it is off."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import FLOAT32_ROUNDOFF, pieces, plain_arithmetic, upper_float32
from tl_flash.kernel.measures import Measures

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of 8 and of 11
LEAST_D_MODEL, LEAST_D_VOCAB = 256, 4096  # of what is screened in low precision
_TYPICAL_FLOAT16 = 2.0**-10, 2.0**10  # lengths of columns held in float16 that are multiplied as they are


@dataclass(frozen=True, eq=False)
class Screen:
    """The matrix that directions are multiplied with to find candidates, and how far it is from the truth."""

    weights: Tensor
    #   [d_model, d_vocab]; multiplied in `dtype`
    dtype: torch.dtype
    #   float32, bfloat16 or float16
    scaled: bool
    #   weights hold column_scale already, and less their mean over the vocabulary
    accumulation: float
    #   |computed - x . w| <= accumulation ||x|| ||w|| for the product, before its result is rounded to dtype
    rounding: float
    bounds: Callable[[], tuple[Tensor, Tensor | None]]
    #   makes `reach` and `residual`
    power: float = 1.0
    #   of two: weights hold so many times the columns, and directions are divided by it
    main: Tensor | None = None
    #   float32 [d_model, r], directions in which the columns vary most: weights hold r rows more, their coordinates in
    #   these, which multiply what rounding took from a direction in these

    @property
    def greatest(self) -> float:
        """No number of `dtype` is beyond."""
        return torch.finfo(self.dtype).max

    @property
    def underflow(self) -> float:
        """What a score may lose beside `rounding` for being near 0."""
        return torch.finfo(self.dtype).tiny

    @property
    def reach(self) -> Tensor:
        """An upper bound on the length of each column of weights (times column_scale), float32 [d_vocab]."""
        return self.bounds()[0]

    @property
    def residual(self) -> Tensor | None:
        """An upper bound on the length of what each column lost to rounding, float32 [d_vocab]; None where nothing."""
        return self.bounds()[1]

    @cached_property
    def longest(self) -> float:
        """Greatest `reach`."""
        return self.reach.amax().item()

    @cached_property
    def typical_errors(self) -> tuple[float, float]:
        """Root mean square length of columns, and of what they lost to rounding."""
        lost = self.residual
        return _root_mean_square(self.reach), 0.0 if lost is None else _root_mean_square(lost)

    @cached_property
    def share_lost(self) -> float:
        """Mean length of what columns lost to rounding, over that of columns."""
        lost = self.residual
        return 0.0 if lost is None else (lost.mean() / self.reach.mean().clamp(min=1e-30)).item()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weights.nbytes + sum(each.nbytes for each in self.bounds() if each is not None)


def _root_mean_square(lengths: Tensor) -> float:
    return lengths.double().square().mean().sqrt().item()


def screened_in(W_U: Tensor) -> torch.dtype | None:
    """In what many directions are screened; None for float32, also where the product is too small for it to show."""
    large = len(W_U) >= LEAST_D_MODEL and W_U.shape[1] >= LEAST_D_VOCAB
    return fast_dtype(W_U.device) if large else None


@cache
def fast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of low precision whose matrices `device` multiplies so much faster than float32 ones that it pays.

    On a GPU with tensor cores float16, which is as fast there as bf16 and eight times finer; on a CPU bf16. Its
    instructions tell, or where torch does not tell of them, it is tried once.
    """
    if device.type == "cuda":
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None
    if device.type != "cpu":
        return None
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if told.get("architecture") == "x86_64":
        intel = "Intel" in str(told.get("cpu_name"))  # whose AVX-512 multiplies bf16 no faster than float32
        pays = bool(told.get("amx_bf16") or (told.get("avx512_bf16") and not intel))
    else:
        pays = _tries_bf16_faster()
    return torch.bfloat16 if pays else None


def _tries_bf16_faster() -> bool:
    def seconds(dtype: torch.dtype, n: int, repeats: int) -> float:
        a, b = torch.ones(n, 512, dtype=dtype), torch.ones(512, 4 * n, dtype=dtype)
        took = []
        for _ in range(repeats + 1):  # the first one warms up
            start = time.perf_counter()
            torch.mm(a, b)
            took.append(time.perf_counter() - start)
        return min(took[1:])

    with plain_arithmetic(torch.device("cpu")):
        for n, repeats, pays in ((16, 1, 10.0), (256, 5, 0.7)):  # emulated bf16 takes seconds in a large product
            if seconds(torch.bfloat16, n, repeats) > pays * seconds(torch.float32, n, repeats):
                return False
    return True


def plain_screen(W_U: Tensor, reach: Callable[[], Tensor]) -> Screen:
    """W_U itself, in float32."""
    # Any order of summing, by fused or plain multiply-adds, and the roundings of x, w and the scale to float32.
    return Screen(
        weights=W_U,
        dtype=torch.float32,
        scaled=False,
        accumulation=1.01 * (len(W_U) + 8) * FLOAT32_ROUNDOFF,
        rounding=8 * FLOAT32_ROUNDOFF,
        bounds=lambda: (reach(), None),
    )


def needs_no_copy(W_U: Tensor, dtype: torch.dtype, column_scale: Tensor | None, size: float) -> bool:
    """Whether W_U, whose columns are about so long, is screened in `dtype` as it is held."""
    aligned = W_U.stride(0) == 1 or (W_U.stride(1) == 1 and W_U.shape[1] % 8 == 0)
    typical = dtype != torch.float16 or _TYPICAL_FLOAT16[0] < size < _TYPICAL_FLOAT16[1]
    return W_U.dtype == dtype and column_scale is None and aligned and typical


def low_screen(W_U: Tensor, dtype: torch.dtype, measures: Measures, main: Callable[[], Tensor]) -> Screen:
    """W_U itself where it is held in `dtype` and unscaled, else a copy in it, scaled and less its mean.

    A copy is taken times a power of two, by which directions are divided, that makes typical coordinates of both
    d_model^-1/4: neither beyond float16, nor their squares beyond float32.
    """
    # Matrix units sum in float32 but may truncate where a CPU rounds: twice the roundoff.
    accumulation = 2.02 * (len(W_U) + 8) * FLOAT32_ROUNDOFF
    rounding = 1.01 * ROUNDOFF[dtype]
    column_scale, reach = measures.column_scale, measures.reach
    if needs_no_copy(W_U, dtype, column_scale, measures.size):
        return Screen(W_U, dtype, False, accumulation, rounding, lambda: (reach, None))
    d_model, d_vocab = W_U.shape
    power = 2.0 ** round(math.log2(d_model**0.25 / measures.size))
    greatest = torch.finfo(dtype).max
    exact = torch.float64 if W_U.dtype == torch.float64 else torch.float32
    directions = main().to(exact)
    copy = torch.empty(d_vocab, d_model + directions.shape[1], dtype=dtype, device=W_U.device)
    length, residual = torch.empty(2, d_vocab, dtype=exact, device=W_U.device)
    mean, scale = measures.mean_column.to(exact), None if column_scale is None else column_scale.to(exact)[:, None]
    for part in pieces(d_vocab, 4 * d_model, W_U.device):
        W = W_U[:, part].T.to(exact, copy=True)
        if scale is not None:
            W *= scale[part]
        W -= mean
        W *= power
        copy[part, :d_model] = W.clamp(-greatest, greatest)
        copy[part, d_model:] = W @ directions
        rounded = copy[part, :d_model].to(exact)
        torch.linalg.vector_norm(rounded, dim=1, out=length[part])
        torch.linalg.vector_norm(W.sub_(rounded), dim=1, out=residual[part])
    summed = (1 + (d_model + 4) * FLOAT32_ROUNDOFF) / power
    # The roundings of mean, scale and W - mean.
    unseen = 4 * FLOAT32_ROUNDOFF * (reach.double() + measures.mean_column.norm())
    bounds = upper_float32(length.double() * summed), upper_float32(residual.double() * summed + unseen)
    main_directions = directions.float() if directions.shape[1] else None
    return Screen(copy.T, dtype, True, accumulation, rounding, lambda: bounds, power, main_directions)
