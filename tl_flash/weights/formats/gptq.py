"""GPTQ: whole numbers of 2, 3, 4 or 8 bits, with a scale and a zero point for each output and group of inputs.

As AutoGPTQ and GPTQModel write it: `qweight` [inputs, outputs] packed along the inputs, `qzeros` [groups, outputs]
along the outputs, both in int32 with the lowest bits first; `scales` [groups, outputs]; `g_idx` says of each input its
group (with `desc_act` they are in no order). The weight is scale (q - zero), the zero in format "gptq" the one written
plus 1, in "gptq_v2" the one written. https://github.com/AutoGPTQ/AutoGPTQ, qlinear_cuda_old.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tl_flash.weights.formats.quantised import Parts, Stored, ending, unpacked_words

_BITS = (2, 3, 4, 8)
_TOGETHER = 32
"""Numbers along the inputs that are unpacked together."""
_PLUS = {"gptq": 1, "gptq_v2": 0}
"""What is added to the zero point as it is written."""


class GPTQ:
    """See `Format`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._bits: Any = config.get("bits")
        if self._bits not in _BITS:
            raise ValueError(f"bits are {self._bits!r}, expected one of {_BITS}")
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        if form not in _PLUS:
            raise ValueError(f"checkpoint_format is {form!r}, expected one of {', '.join(_PLUS)}")
        self._plus = _PLUS[form]
        self._group = config.get("group_size", -1)

    def parts(self, names: Iterable[str]) -> dict[str, Parts]:
        """See `Format`."""
        parts = {name: f".{name}" for name in ("qweight", "qzeros", "scales", "g_idx")}
        return ending(names, {".qweight": ".weight"}, parts)

    def label(self, parts: Parts) -> str:
        """See `Format`."""
        return f"GPTQ int{self._bits}"

    def stored(self, parts: Mapping[str, Tensor]) -> Stored:
        """See `Format`."""
        packed, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        if packed.ndim != 2 or packed.dtype != torch.int32 or zeros.dtype != torch.int32:
            raise ValueError(f"is {packed.dtype} {tuple(packed.shape)} with qzeros {zeros.dtype}; expected int32")
        n_inputs, n_outputs, n_groups = packed.shape[0] * 32 // self._bits, packed.shape[1], len(scales)
        if packed.shape[0] * 32 % self._bits or n_outputs * self._bits % 32:
            raise ValueError(f"is {tuple(packed.shape)}, which holds no whole number of {self._bits} bits a word")
        shapes = {"scales": (n_groups, n_outputs), "qzeros": (n_groups, n_outputs * self._bits // 32)}
        for name, shape in shapes.items():
            if parts[name].shape != shape:
                raise ValueError(f"has {name} of shape {tuple(parts[name].shape)}, expected {shape}")
        group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(n_inputs) // self._group_size(n_inputs)
        if group.shape != (n_inputs,) or int(group.min()) < 0 or int(group.max()) + 1 != n_groups:
            raise ValueError(
                f"has g_idx {tuple(group.shape)} up to {int(group.max())}; expected {n_inputs} of {n_groups}"
            )

        @cache
        def zero_points() -> Tensor:
            return (unpacked_words(zeros, self._bits) + self._plus) % 2**self._bits

        def unpack(rows: slice, columns: slice) -> Tensor:
            first, last = rows.start // _TOGETHER, -(-rows.stop // _TOGETHER)
            words = packed[first * self._bits : last * self._bits, columns]
            whole = unpacked_words(words.T, self._bits).T[rows.start - first * _TOGETHER :][: rows.stop - rows.start]
            of = group[rows]
            return scales[:, columns].float()[of] * (whole - zero_points()[:, columns][of])

        return Stored((n_inputs, n_outputs), unpack, transposed=True)

    def _group_size(self, n_inputs: int) -> int:
        return self._group if isinstance(self._group, int) and self._group > 0 else n_inputs
