"""MXFP4 as gpt-oss has it: stacks of experts in four-bit floats, 32 of which share an exponent of two in a byte.

`x_blocks` is [expert, output, group, 16] bytes of two floats, the first in the lower half, `x_scales` [expert, output,
group]; the model's own `x` is [expert, input, output]. The numbers are those of transformers'
`convert_moe_packed_tensors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tl_flash.weights.formats.quantised import Parts, Stored, ending, exponents, looked_up

_GROUP = 32


class MXFP4:
    """See `Format`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        pass  # its only options say what was left as it was, which the names tell

    def parts(self, names: Iterable[str]) -> dict[str, Parts]:
        """See `Format`."""
        return ending(names, {"_blocks": ""}, {"blocks": "_blocks", "scales": "_scales"})

    def label(self, parts: Parts) -> str:
        """See `Format`."""
        return "MXFP4"

    def stored(self, parts: Mapping[str, Tensor]) -> Stored:
        """See `Format`."""
        blocks, scales = parts["blocks"], parts["scales"]
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise ValueError(f"is {blocks.dtype}, scaled by {scales.dtype}; expected bytes")
        if blocks.ndim != 4 or blocks.shape[-1] != _GROUP // 2 or scales.shape != blocks.shape[:-1]:
            raise ValueError(
                f"is {tuple(blocks.shape)}, scaled by {tuple(scales.shape)}; expected [expert, output, group, 16] and "
                "[expert, output, group]"
            )
        shape = (*blocks.shape[:2], blocks.shape[2] * _GROUP)
        packed, by = blocks.flatten(0, 1).flatten(1), scales.flatten(0, 1)

        def unpack(rows: slice, columns: slice) -> Tensor:
            powers = exponents(by[rows])[:, torch.arange(columns.start, columns.stop) // _GROUP]
            return torch.ldexp(looked_up(packed[rows], columns), powers)

        return Stored(shape, unpack, transposed=True)
