"""What every part of the engine counts on: products in the precision asked for, and work cut into parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

FLOAT32_ROUNDOFF = 2.0**-24  # a significand of 24 bits
HALVES_UNIT = 2.0**9
MULTIPLIES_HALVES = "dtype" in torch.ops.aten.mm.overloads()  # float16 to float32, on a GPU: torch 2.8 and later
PIECE_BYTES = {"cpu": 2**20, "cuda": 2**27}  # of a piece of W_U: what stays in a cache, what keeps a GPU busy


def parts(total: int, size: int) -> Iterator[slice]:
    """Cut `range(total)` into the fewest nearly equal slices of at most `size` (at least 1)."""
    count = math.ceil(total / max(size, 1))
    for i in range(count):
        yield slice(total * i // count, total * (i + 1) // count)


def pieces(total: int, a_unit: int, device: torch.device) -> Iterator[slice]:
    """Cut `range(total)` into pieces of `PIECE_BYTES` at most, where each unit takes so many (at least 1 unit)."""
    return parts(total, PIECE_BYTES[device.type] // a_unit)


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Keep products in the precision asked for, on which bounds depend: no autocast, TF32, or sums below float32."""
    with ExitStack() as settings:
        settings.enter_context(torch.autocast(device.type, enabled=False))
        for less in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
            settings.enter_context(_set(torch.backends.cuda.matmul, less, False))
        if hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation"):  # torch 2.7 and later
            settings.enter_context(_set(torch.backends.cuda.matmul, "allow_fp16_accumulation", False))
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later; the older way may raise there
            for backend in (torch.backends.cuda, torch.backends.mkldnn):
                settings.enter_context(_set(getattr(backend, "matmul"), "fp32_precision", "ieee"))  # noqa: B009
        else:
            settings.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x, float32 and at most 64, times `HALVES_UNIT` as the sum of two float16 tensors, to some 2^-21 of the greatest.

    Three products of halves come next to one in float32, and take a GPU a fraction of its time.
    """
    scaled = x * HALVES_UNIT
    high = scaled.half()
    return high, (scaled - high).half()


def upper_float32(lengths: Tensor) -> Tensor:
    """Lengths in float32, none less than it was."""
    return (lengths * (1 + 2.0**-22)).float()


@contextmanager
def _set(holder: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
