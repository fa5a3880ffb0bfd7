"""AWQ: whole numbers of 4 bits, with a scale and a zero point for each output and group of inputs.

As AutoAWQ writes it in its version "gemm": `qweight` [inputs, outputs] and `qzeros` [groups, outputs] in int32 that
hold 8 outputs each, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on; `scales` [groups, outputs]. The weight
is scale (q - zero). https://github.com/casper-hansen/AutoAWQ, awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tl_flash.weights.formats.quantised import Grid, Parts, Stored, ending, unpacked_words

_EACH = 8
"""Numbers in a word."""
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word each of its outputs is."""


class AWQ:
    """See `Format`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("bits", 4) != 4:
            raise ValueError(f"bits are {config['bits']!r}, expected 4")
        self._group = config.get("group_size", -1)
        form = str(config.get("version") or config.get("format") or "gemm").lower()
        if form != "gemm":
            raise ValueError(f"version is {form!r}, expected 'gemm'")

    def parts(self, names: Iterable[str]) -> dict[str, Parts]:
        """See `Format`."""
        return ending(names, {".qweight": ".weight"}, {name: f".{name}" for name in ("qweight", "qzeros", "scales")})

    def label(self, parts: Parts) -> str:
        """See `Format`."""
        return "AWQ int4"

    def stored(self, parts: Mapping[str, Tensor]) -> Stored:
        """See `Format`."""
        packed, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        if packed.ndim != 2 or packed.dtype != torch.int32 or zeros.dtype != torch.int32:
            raise ValueError(f"is {packed.dtype} {tuple(packed.shape)} with qzeros {zeros.dtype}; expected int32")
        shape = (len(packed), packed.shape[1] * _EACH)
        if scales.ndim != 2 or scales.shape[1] != shape[1] or zeros.shape != (len(scales), packed.shape[1]):
            raise ValueError(
                f"has scales {tuple(scales.shape)} and qzeros {tuple(zeros.shape)}, expected [groups, {shape[1]}] and "
                f"[groups, {packed.shape[1]}]"
            )
        groups = [(self._group, 1)] if isinstance(self._group, int) and self._group > 0 else [(shape[0], 1)]
        scale = Grid(scales, shape, groups)

        @cache
        def zero_points() -> Grid:
            return Grid(_in_order(zeros), shape, groups)

        def unpack(rows: slice, columns: slice) -> Tensor:
            first, last = columns.start // _EACH, -(-columns.stop // _EACH)
            whole = _in_order(packed[rows, first:last])[:, columns.start - first * _EACH : columns.stop - first * _EACH]
            return scale.at(rows, columns) * (whole - zero_points().at(rows, columns))

        return Stored(shape, unpack, transposed=True)


def _in_order(words: Tensor) -> Tensor:
    return unpacked_words(words, 4).unflatten(-1, (-1, _EACH))[..., _PLACES].flatten(-2)
