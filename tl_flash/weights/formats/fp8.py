"""FP8: matrices of eight-bit floats, and a scale for each block of rows and columns, each row, or all.

As DeepSeek published it (`weight_scale_inv` beside `weight`: the number that multiplies, whatever its name says), in
the variants of transformers' `FineGrainedFP8Config` and `FbgemmFp8Config` and of vLLM (`weight_scale`). Some hold
experts as two four-bit floats a byte, under the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from tl_flash.weights.formats.quantised import Grid, Parts, Stored, ending, looked_up

FLOATS = {
    dtype
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if (dtype := getattr(torch, name, None)) is not None
}
_BLOCK, _FOUR_BITS = [128, 128], [1, 32]
"""Rows and columns with a scale in common, where the config says nothing, and where experts are in four bits."""


class FP8:
    """See `Format`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        block = config.get("weight_block_size", _BLOCK)
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
        ):
            raise ValueError(f"weight_block_size is {block!r}, expected rows and columns")
        self._block = block or _BLOCK

    def parts(self, names: Iterable[str]) -> dict[str, Parts]:
        """See `Format`."""
        names = set(names)
        found = {}
        for end in ("_scale_inv", "_scale"):
            found |= ending(names, {end: ""}, {"weight": "", "scale": end})
        found |= ending(names, {".scale": ".weight"}, {"weight": ".weight", "scale": ".scale"})
        return {name: parts for name, parts in found.items() if "weight" in parts}

    def label(self, parts: Parts) -> str:
        """See `Format`."""
        return "FP8"

    def stored(self, parts: Mapping[str, Tensor]) -> Stored:
        """See `Format`."""
        weight, scale = parts["weight"], parts["scale"]
        *first, columns = weight.shape
        if weight.dtype == torch.int8:
            shape = (*first, 2 * columns)
        elif weight.dtype in FLOATS:
            shape = (*first, columns)
        else:
            raise ValueError(f"has a scale, so that float8 was expected, and is {weight.dtype}")
        blocks = [_FOUR_BITS] if weight.dtype == torch.int8 else [self._block]
        grid, rows_of = Grid(scale, shape, blocks), weight.reshape(prod(first), columns)

        def unpack(rows: slice, columns: slice) -> Tensor:
            packed = rows_of[rows]
            numbers = packed[:, columns].float() if packed.dtype in FLOATS else looked_up(packed, columns)
            return numbers * grid.at(rows, columns)

        return Stored(shape, unpack)
