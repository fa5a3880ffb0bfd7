"""Arrays as the page carries them: little-endian, byte planes apart, gzipped, base64."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_flash.maps import Comparison, ConceptTable, NeuronMap

NULL_POINTS = 256
"""Quantiles of a layer's null that the page gets."""
GZIP = "gzip:"
_LEVEL, _SAMPLE, _WORTH = 4, 1 << 16, 0.85


@dataclass(frozen=True)
class Column:
    """One array of the page, flat; what it stands for is `values * step`.

    It travels as byte planes: every value's lowest byte, then every value's second, and so on. The high ones are much
    alike and pack well; the low ones are noise, and stay as they are rather than cost the browser time to unpack.
    """

    values: np.ndarray
    step: float = 1.0

    def layout(self) -> dict[str, Any]:
        """What the page needs to read it."""
        return {"type": self.values.dtype.newbyteorder("<").str[1:], "step": self.step}

    def planes(self) -> list[str]:
        """Each byte plane in base64, the packed ones marked by a leading "gzip:"."""
        flat = np.ascontiguousarray(self.values.reshape(-1).astype(self.values.dtype.newbyteorder("<")))
        return [_plane(plane.tobytes()) for plane in flat.view(np.uint8).reshape(len(flat), -1).T]


def blob(data: bytes) -> str:
    """Gzipped and in base64."""
    return GZIP + base64.b64encode(gzip.compress(data, _LEVEL, mtime=0)).decode()


def json_blob(value: Any) -> str:
    """JSON, gzipped and in base64; NaN and infinities have no place in it."""
    return blob(json.dumps(value, allow_nan=False).encode())


def _plane(data: bytes) -> str:
    packs = len(gzip.compress(data[:_SAMPLE], 1)) < _WORTH * len(data[:_SAMPLE])
    return blob(data) if packs else base64.b64encode(data).decode()


def columns(map: NeuronMap, comparison: Comparison | None = None) -> dict[str, Column]:
    """The arrays of one side, a row a neuron, layer by layer."""
    packed = {"kurtosis": _float(map.kurtosis), "norm": _float(map.norm)}
    for name, pole in (("pos", map.positive), ("neg", map.negative)):
        packed[f"{name}.ids"] = _ids(pole.ids, map.d_vocab)
        packed[f"{name}.z"] = _steps(pole.z)
        packed[f"{name}.top_z"] = _float(pole.z[..., 0])
        if map.side != "direction":
            packed[f"{name}.write_z"] = _steps(pole.write_z)
        if map.score == "dot":
            packed[f"{name}.log_z"] = _float(pole.log_z.masked_fill(map.zero, torch.inf))
    if map.score == "dot":
        packed["scale"] = _float(map.positive.tau * map.std)
    if map.null is not None:
        points = torch.linspace(0, 1, NULL_POINTS, dtype=torch.float64)
        for name in ("z", "kurtosis"):
            draws: Tensor = getattr(map.null, name)
            quantiles = torch.nanquantile(draws.double(), points, dim=1).T
            packed[f"null.{name}"] = _float(quantiles.nan_to_num(torch.inf))  # without a null nothing is beyond it
    if comparison is not None:
        packed["other.ids"] = _ids(comparison.ids[1], map.d_vocab)
        packed["other.top_z"] = _float(comparison.b.positive.z[..., 0])
    return packed


def concept_columns(map: NeuronMap, tables: Sequence[ConceptTable]) -> dict[str, Column]:
    """Every neuron's mean z of each concept, under "concept.0" and so on; nothing where the side was not searched."""
    side = "lens" if map.source.lens is not None and map.side == "out" else map.side
    every = [(table, at) for table in tables for at in range(len(table.names))]
    return {
        f"concept.{number}": _steps(table.z[at, table.readings.index(side)].nan_to_num(0))
        for number, (table, at) in enumerate(every)
        if side in table.readings
    }


def _float(tensor: Tensor) -> Column:
    return Column(_numbers(tensor))


def _numbers(tensor: Tensor) -> np.ndarray:
    """In float32, a zero direction's NaN as 0."""
    return np.nan_to_num(tensor.float().cpu().numpy(), nan=0.0)


def _ids(ids: Tensor, d_vocab: int) -> Column:
    """A zero direction's -1 is the id after the last, whose string is that of no token."""
    ids = torch.where(ids < 0, d_vocab, ids)
    return Column(ids.cpu().numpy().astype(np.uint16 if d_vocab < 1 << 16 else np.uint32))


def _steps(tensor: Tensor) -> Column:
    """In 16 bits: whole steps of the largest over 65,535, or over 32,767 where some are negative."""
    values = _numbers(tensor)
    dtype = np.int16 if values.min() < 0 else np.uint16
    step = float(np.abs(values).max()) / np.iinfo(dtype).max or 1.0
    return Column(np.rint(values / step).clip(np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype), step)
