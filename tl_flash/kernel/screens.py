"""Screens: the matrix that every score is first multiplied with, in a precision that pays, and how far it is off."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts, plain_arithmetic

FLOAT32_ROUNDOFF, BF16_ROUNDOFF = 2.0**-24, 2.0**-8  # significands of 24 and 8 bits
LEAST_D_MODEL, LEAST_D_VOCAB = 256, 4096  # of what is screened in bf16
PART_BYTES = 4 * 2**20  # of float64, while W_U is measured


@dataclass(frozen=True, eq=False)
class Screen:
    """The matrix that directions are multiplied with to find candidates, and how far it is from the truth."""

    weights: Tensor
    #   [d_model, d_vocab]; multiplied in `dtype`
    dtype: torch.dtype
    #   float32 or bfloat16
    scaled: bool
    #   weights hold column_scale already, and less their mean over the vocabulary
    reach: Tensor
    #   float32 [d_vocab], an upper bound on the length of each column of weights (times column_scale)
    residual: Tensor
    #   float32 [d_vocab], an upper bound on the length of what each column lost to rounding
    accumulation: float
    #   |computed - x . w| <= accumulation ||x|| ||w|| for the product, before its result is rounded to dtype
    rounding: float


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
        return bool(told.get("avx512_bf16") or told.get("amx_bf16"))
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


def plain_screen(W_U: Tensor, reach: Tensor) -> Screen:
    """W_U itself, in float32."""
    # Any order of summing, by fused or plain multiply-adds, and the roundings of x, w and the scale to float32.
    accumulation = 1.01 * (len(W_U) + 8) * FLOAT32_ROUNDOFF
    return Screen(
        weights=W_U,
        dtype=torch.float32,
        scaled=False,
        reach=reach,
        residual=torch.zeros_like(reach),
        accumulation=accumulation,
        rounding=8 * FLOAT32_ROUNDOFF,
    )


def bf16_screen(W_U: Tensor, column_scale: Tensor | None, mean_column: Tensor, reach: Tensor) -> Screen:
    """W_U itself where it is held in bf16 and unscaled, else a bf16 copy, scaled and less its mean."""
    # Matrix units sum in float32 but may truncate where a CPU rounds: twice the roundoff.
    accumulation = 2.02 * (len(W_U) + 8) * FLOAT32_ROUNDOFF
    rounding = 1.01 * BF16_ROUNDOFF
    aligned = W_U.stride(0) == 1 or (W_U.stride(1) == 1 and W_U.shape[1] % 8 == 0)
    if W_U.dtype == torch.bfloat16 and column_scale is None and aligned:
        return Screen(W_U, torch.bfloat16, False, reach, torch.zeros_like(reach), accumulation, rounding)
    copy = torch.empty(W_U.shape[::-1], dtype=torch.bfloat16, device=W_U.device).T
    length, residual = torch.empty(2, W_U.shape[1], dtype=torch.float64, device=W_U.device)
    for part in parts(W_U.shape[1], PART_BYTES // (8 * len(W_U))):
        W = W_U[:, part].to(torch.float64, copy=True)
        if column_scale is not None:
            W *= column_scale[part]
        W -= mean_column[:, None]
        copy[:, part] = W
        length[part] = torch.linalg.vector_norm(copy[:, part].double(), dim=0)
        residual[part] = torch.linalg.vector_norm(W.sub_(copy[:, part]), dim=0)
    residual += 1e-12 * (reach + mean_column.norm())  # float64's own rounding, seen where columns are all but equal
    return Screen(
        weights=copy,
        dtype=torch.bfloat16,
        scaled=True,
        reach=upper_float32(length),
        residual=upper_float32(residual),
        accumulation=accumulation,
        rounding=rounding,
    )


def upper_float32(lengths: Tensor) -> Tensor:
    """Lengths in float32, none less than it was."""
    return (lengths * (1 + 2.0**-22)).float()
