"""Screens: the matrix that every score is first multiplied with, in a precision that pays, and how far it is off."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts, plain_arithmetic

FLOAT32_ROUNDOFF, BF16_ROUNDOFF = 2.0**-24, 2.0**-8  # significands of 24 and 8 bits
LEAST_D_MODEL, LEAST_D_VOCAB = 256, 4096  # of what is screened in bf16
PART_BYTES = 2**20  # of a piece of W_U that is worked on


@dataclass(frozen=True, eq=False)
class Screen:
    """The matrix that directions are multiplied with to find candidates, and how far it is from the truth."""

    weights: Tensor
    #   [d_model, d_vocab]; multiplied in `dtype`
    dtype: torch.dtype
    #   float32 or bfloat16
    scaled: bool
    #   weights hold column_scale already, and less their mean over the vocabulary
    accumulation: float
    #   |computed - x . w| <= accumulation ||x|| ||w|| for the product, before its result is rounded to dtype
    rounding: float
    bounds: Callable[[], tuple[Tensor, Tensor | None]]
    #   makes `reach` and `residual`
    main: Tensor | None = None
    #   float32 [d_model, r], directions in which the columns vary most: weights hold r rows more, their coordinates in
    #   these, which multiply what rounding took from a direction in these

    @property
    def reach(self) -> Tensor:
        """An upper bound on the length of each column of weights (times column_scale), float32 [d_vocab]."""
        return self.bounds()[0]

    @property
    def residual(self) -> Tensor | None:
        """An upper bound on the length of what each column lost to rounding, float32 [d_vocab]; None where nothing."""
        return self.bounds()[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weights.nbytes + sum(each.nbytes for each in self.bounds() if each is not None)


def screens_in_bf16(W_U: Tensor) -> bool:
    """Whether scores are screened in bf16: not where the product is too small for the time that it saves to show."""
    return len(W_U) >= LEAST_D_MODEL and W_U.shape[1] >= LEAST_D_VOCAB and multiplies_bf16_faster(W_U.device)


@cache
def multiplies_bf16_faster(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices so much faster than float32 ones that it pays.

    A GPU's or an x86 processor's instructions tell. Where torch does not tell of them, it is tried once.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if told.get("architecture") == "x86_64":
        intel = "Intel" in str(told.get("cpu_name"))  # whose AVX-512 multiplies bf16 no faster than float32
        return bool(told.get("amx_bf16") or (told.get("avx512_bf16") and not intel))
    return _tries_bf16_faster()


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


def needs_no_copy(W_U: Tensor, column_scale: Tensor | None) -> bool:
    """Whether W_U is screened in bf16 as it is held."""
    aligned = W_U.stride(0) == 1 or (W_U.stride(1) == 1 and W_U.shape[1] % 8 == 0)
    return W_U.dtype == torch.bfloat16 and column_scale is None and aligned


def bf16_screen(
    W_U: Tensor, column_scale: Tensor | None, mean_column: Tensor, reach: Tensor, main: Callable[[], Tensor]
) -> Screen:
    """W_U itself where it is held in bf16 and unscaled, else a bf16 copy, scaled and less its mean."""
    # Matrix units sum in float32 but may truncate where a CPU rounds: twice the roundoff.
    accumulation = 2.02 * (len(W_U) + 8) * FLOAT32_ROUNDOFF
    rounding = 1.01 * BF16_ROUNDOFF
    if needs_no_copy(W_U, column_scale):
        return Screen(W_U, torch.bfloat16, False, accumulation, rounding, lambda: (reach, None))
    d_model, d_vocab = W_U.shape
    exact = torch.float64 if W_U.dtype == torch.float64 else torch.float32
    directions = main().to(exact)
    copy = torch.empty(d_vocab, d_model + directions.shape[1], dtype=torch.bfloat16, device=W_U.device)
    length, residual = torch.empty(2, d_vocab, dtype=exact, device=W_U.device)
    mean, scale = mean_column.to(exact), None if column_scale is None else column_scale.to(exact)[:, None]
    for part in parts(d_vocab, PART_BYTES // (4 * d_model)):
        W = W_U[:, part].T.to(exact, copy=True)
        if scale is not None:
            W *= scale[part]
        W -= mean
        copy[part, :d_model] = W
        copy[part, d_model:] = W @ directions
        rounded = copy[part, :d_model].to(exact)
        torch.linalg.vector_norm(rounded, dim=1, out=length[part])
        torch.linalg.vector_norm(W.sub_(rounded), dim=1, out=residual[part])
    summed = 1 + (d_model + 4) * FLOAT32_ROUNDOFF
    unseen = 4 * FLOAT32_ROUNDOFF * (reach.double() + mean_column.norm())  # the roundings of mean, scale and W - mean
    bounds = upper_float32(length.double() * summed), upper_float32(residual.double() * summed + unseen)
    return Screen(copy.T, torch.bfloat16, True, accumulation, rounding, lambda: bounds, directions.float())


def upper_float32(lengths: Tensor) -> Tensor:
    """Lengths in float32, none less than it was."""
    return (lengths * (1 + 2.0**-22)).float()
