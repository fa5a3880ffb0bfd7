"""compressed-tensors, as llm-compressor and vLLM write it: several formats, told by the names and shapes of the parts.

`weight_packed` in int32 are whole numbers of 2, 4 or 8 bits, each with half its range added, packed along the inputs,
the lowest bits first (`pack-quantized`), with `weight_shape`, and zero points packed alike along the outputs. In bytes
it is two four-bit floats (`nvfp4-pack-quantized`: groups of 16 with float8 scales, which `weight_global_scale` divides;
`mxfp4-pack-quantized`: groups of 32 with exponents). A `weight` with a `weight_scale` is int8 or float8 as it is
(`int-quantized`, `float-quantized`, `naive-quantized`, `mxfp8-quantized`). The weight is scale (q - zero).
https://github.com/vllm-project/compressed-tensors, whose functions the tests compare these with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from tl_flash.weights.formats.fp8 import FLOATS
from tl_flash.weights.formats.quantised import Grid, Parts, Stored, ending, floats, looked_up, unpacked_words

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_PARTS = ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")


class CompressedTensors:
    """See `Format`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise ValueError(f"config_groups are {groups!r}, expected groups of layers with their schemes")
        forms = {config.get("format"), *(group.get("format") for group in groups.values())} - {None}
        if not forms or forms - {*_FORMATS}:
            raise ValueError(f"format is {', '.join(sorted(forms)) or None}, expected one of {', '.join(_FORMATS)}")
        sparse = (config.get("sparsity_config") or {}).get("format", "dense")
        if sparse != "dense" or config.get("transform_config"):
            raise ValueError(f"weights are rotated or sparse ({sparse}), expected them as the model has them")
        schemes = [scheme for group in groups.values() if isinstance(scheme := group.get("weights"), dict)]
        self._bits = {int(scheme["num_bits"]) for scheme in schemes if scheme.get("num_bits")}
        self._groups = {size for scheme in schemes if (size := scheme.get("group_size") or 0) > 0}
        self._ungrouped = any((scheme.get("group_size") or 0) <= 0 for scheme in schemes)
        self._blocks = [block for scheme in schemes if (block := scheme.get("block_structure"))]
        self._blocks += [(1, size) for size in self._groups]
        self._kinds = sorted({_kind(scheme) for scheme in schemes})

    def parts(self, names: Iterable[str]) -> dict[str, Parts]:
        """See `Format`."""
        names = set(names)
        parts = {name: f".weight_{name}" for name in _PARTS} | {"weight": ".weight"}
        found = ending(names, {".weight_packed": ".weight", ".weight_scale": ".weight"}, parts)
        return {name: own for name, own in found.items() if "packed" in own or "weight" in own}

    def label(self, parts: Parts) -> str:
        """See `Format`."""
        if "packed" in parts and "shape" not in parts:
            return f"compressed-tensors {'NVFP4' if 'global_scale' in parts else 'MXFP4'}"
        kinds = [kind for kind in self._kinds if kind.startswith("int") or "packed" not in parts]
        whole = [kind for kind in kinds if "packed" in parts or kind.endswith("8")]
        return f"compressed-tensors {' or '.join(whole or kinds)}"

    def stored(self, parts: Mapping[str, Tensor]) -> Stored:
        """See `Format`."""
        if "packed" not in parts:
            return self._plain(parts)
        if parts["packed"].dtype == torch.uint8:
            return _four_bit_floats(parts)
        return self._whole(parts)

    def _plain(self, parts: Mapping[str, Tensor]) -> Stored:
        weight = parts["weight"]
        if weight.dtype not in FLOATS | {torch.int8}:
            raise ValueError(f"has a scale, so that int8 or float8 was expected, and is {weight.dtype}")
        shape = tuple(weight.shape)
        scale, zero = (
            Grid(values, shape, self._blocks) if (values := parts.get(name)) is not None else None
            for name in ("scale", "zero_point")
        )
        assert scale is not None  # its name is how the tensor was found
        rows_of = weight.reshape(prod(shape[:-1]), shape[-1])

        def unpack(rows: slice, columns: slice) -> Tensor:
            numbers = rows_of[rows][:, columns].float()
            return (numbers if zero is None else numbers - zero.at(rows, columns)) * scale.at(rows, columns)

        return Stored(shape, unpack)

    def _whole(self, parts: Mapping[str, Tensor]) -> Stored:
        packed, scales, zeros = parts["packed"], parts["scale"], parts.get("zero_point")
        shape = tuple(parts["shape"].tolist())
        fits = [bits for bits in (2, 4, 8) if bits in self._bits and packed.shape == _packed(shape, bits)]
        if packed.dtype != torch.int32 or len(shape) != 2 or not fits:
            raise ValueError(
                f"is {packed.dtype} {tuple(packed.shape)} for a weight of {shape}, expected int32 of "
                f"{' or '.join(map(str, sorted(self._bits)))} bits, which are to be 2, 4 or 8"
            )
        bits, n_groups = fits[0], scales.shape[-1]
        half = 1 << bits - 1
        known = {-(-shape[1] // size) for size in self._groups} | ({1} if self._ungrouped else set())
        if scales.shape != (shape[0], n_groups) or n_groups not in known or shape[1] % n_groups:
            groups = " or ".join(map(str, sorted(known)))
            raise ValueError(f"is scaled by {tuple(scales.shape)}, expected [{shape[0]}, {groups}]")
        if zeros is not None and tuple(zeros.shape) != _packed((n_groups, shape[0]), bits)[::-1]:
            raise ValueError(f"has zero points {tuple(zeros.shape)} beside scales {tuple(scales.shape)}")
        group = torch.arange(shape[1]) // (shape[1] // n_groups)
        if "g_idx" in parts and int(parts["g_idx"].min()) >= 0:  # negative ones were never set
            group = parts["g_idx"].long()
        if group.shape != (shape[1],) or int(group.max()) >= n_groups:
            raise ValueError(f"has groups {tuple(group.shape)} up to {int(group.max())}, expected {n_groups}")
        each = 32 // bits

        @cache
        def zero_points() -> Tensor:
            return unpacked_words(zeros.T, bits).T[: shape[0]] - half  # pyright: ignore[reportOptionalMemberAccess]

        def unpack(rows: slice, columns: slice) -> Tensor:
            first, of = columns.start // each, group[columns]
            words = packed[rows, first : -(-columns.stop // each)]
            whole = unpacked_words(words, bits)[:, columns.start - first * each : columns.stop - first * each]
            whole = whole - half if zeros is None else whole - half - zero_points()[rows][:, of]
            return whole * scales[rows].float()[:, of]

        return Stored(shape, unpack)


def _kind(scheme: Mapping[str, Any]) -> str:
    return f"{'FP' if scheme.get('type') == 'float' else 'int'}{scheme.get('num_bits')}"


def _packed(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """The shape of a matrix whose rows are packed in words."""
    return (*shape[:-1], -(-shape[-1] * bits // 32))


def _four_bit_floats(parts: Mapping[str, Tensor]) -> Stored:
    packed, scales, over = parts["packed"], parts["scale"], parts.get("global_scale")
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    size = 32 if over is None else 16
    if (
        packed.ndim != 2
        or scales.shape != (shape[0], shape[1] // size)
        or (over is None) != (scales.dtype == torch.uint8)
    ):
        raise ValueError(
            f"is {tuple(packed.shape)} bytes, scaled by {scales.dtype} {tuple(scales.shape)}; expected one float8 of "
            "16 numbers beside weight_global_scale, or one byte of 32"
        )
    if over is not None and over.numel() != 1:
        raise ValueError(f"has weight_global_scale {tuple(over.shape)}, expected one number")
    over = torch.ones(()) if over is None else over.float().reshape(())

    def unpack(rows: slice, columns: slice) -> Tensor:
        by = floats(scales[rows]) / over
        return looked_up(packed[rows], columns) * by[:, torch.arange(columns.start, columns.stop) // size]

    return Stored(shape, unpack)
