"""Checkpoints in GGUF, one file or a split one: the header is read once, tensors are mapped and dequantised in pieces.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; how its blocks are dequantised
comes from the package `gguf` of llama.cpp.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from tl_flash.weights.formats.packed import Boxes, Packed

_VERSIONS = (2, 3)
_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""Types that are stored as they are."""
_LONG = 2**12
"""Of a list that says something of layers or heads."""


class Info(NamedTuple):
    """Where a tensor lies in its file."""

    path: Path
    shape: tuple[int, ...]
    kind: int
    start: int
    """Of its bytes, in the file."""

    @property
    def quantisation(self) -> str:
        """What the type is called."""
        try:
            return gguf.GGMLQuantizationType(self.kind).name
        except ValueError:
            return f"type {self.kind}"


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    path: Path
    fields: dict[str, Any]
    """Numbers, texts and lists of numbers; nothing of the vocabulary."""
    records: dict[str, bytes]
    """The same fields as they are written."""
    tensors: dict[str, Info]

    @classmethod
    def of(cls, path: Path) -> Header:
        """Read the header of a file, and check that the file holds what it promises.

        Raises:
            ValueError: no GGUF file, one of another version or byte order, a truncated or altered one.
        """
        size = path.stat().st_size
        data: Any = np.memmap(path, mode="r", dtype=np.uint8) if size else b""
        try:
            return _Parser(path, memoryview(data)).header()
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path}: its header is truncated or altered ({error}); fetch the file again") from error


class _Parser:
    """Goes through a header once."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def header(self) -> Header:
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError(f"{self.path}: no GGUF file (it does not begin with GGUF); expected one")
        self.at = 4
        number = self.take("I")
        if number not in _VERSIONS:
            why = "of a big-endian machine" if number & 0xFFFF == 0 else f"of GGUF version {number}"
            raise ValueError(
                f"{self.path}: {why}; expected little-endian GGUF of version {_VERSIONS[0]} or {_VERSIONS[1]}"
            )
        n_tensors, n_fields = self.take("Q"), self.take("Q")
        fields, records = {}, {}
        for _ in range(n_fields):
            start = self.at
            name, kind = self.text(), self.take("I")
            value = self.value(kind)
            if value is not None:
                fields[name], records[name] = value, bytes(self.data[start : self.at])
        infos = [self.info() for _ in range(n_tensors)]
        return Header(self.path, fields, records, self.placed(infos, fields.get("general.alignment", 32)))

    def take(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def skip(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise struct.error(f"{count} bytes expected at {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def text(self) -> str:
        return str(self.skip(self.take("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        """A field's value; None for a list of texts or of lists, and for one that is as long as a vocabulary."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        inner, count = self.take("I"), self.take("Q")
        if inner in _SCALARS:
            numbers = self.skip(count * struct.calcsize("<" + _SCALARS[inner]))
            return [*struct.unpack(f"<{count}{_SCALARS[inner]}", numbers)] if count <= _LONG else None
        for _ in range(count):
            if inner == _STRING:
                self.skip(self.take("Q"))
            else:
                self.value(inner)
        return None

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        shape = tuple(self.take("Q") for _ in range(self.take("I")))[::-1]
        return name, shape, self.take("I"), self.take("Q")

    def placed(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, Info]:
        """The tensors by name, each within the file and beside the others."""
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.path}: altered: general.alignment is {alignment!r}; fetch the file again")
        start = -(-self.at // alignment) * alignment
        tensors = {name: Info(self.path, shape, kind, start + offset) for name, shape, kind, offset in infos}
        if len(tensors) < len(infos):
            raise ValueError(f"{self.path}: altered: some tensor is there twice; fetch the file again")
        end, before = start, "the header"
        for name, info in sorted(tensors.items(), key=lambda pair: pair[1].start):
            if info.kind not in _SIZES:
                continue
            block, size = _SIZES[info.kind]
            if not info.shape or info.shape[-1] % block or info.start < end:
                raise ValueError(
                    f"{self.path}: altered: {name}, {info.shape} of {info.quantisation}, begins at byte {info.start}, "
                    f"where {before} ends at {end}; fetch the file again"
                )
            end, before = info.start + prod(info.shape) // block * size, name
            if end > len(self.data):
                raise ValueError(
                    f"{self.path}: truncated: {name} ends at byte {end}, the file at {len(self.data)}; fetch it again"
                )
        return tensors


_SIZES = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
"""By type, how many numbers a block holds and in how many bytes."""


class GGUFTensors(Mapping[str, Tensor]):
    """Tensors by their names in GGUF; quantised ones are `Packed`, and none is read before its numbers are used."""

    def __init__(self, tensors: Mapping[str, Info], checkpoint: str) -> None:
        self._tensors, self._checkpoint = tensors, checkpoint
        self._boxes = Boxes(lambda info: partial(_unpacked, info))

    def __getitem__(self, name: str) -> Tensor:
        info = self.info(name)
        if info.kind in PLAIN:
            size = prod(info.shape) * PLAIN[info.kind].itemsize
            data = np.memmap(info.path, np.uint8, "c", info.start, (size,))
            return torch.from_numpy(data).view(PLAIN[info.kind]).reshape(info.shape)
        return Packed.of(info.shape, self._boxes.of(info))

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> Info:
        """Where a tensor is.

        Raises:
            ValueError: it is missing, or of a type that the package `gguf` does not dequantise.
        """
        if name not in self._tensors:
            raise ValueError(f"{self._checkpoint}: no tensor {name}; expected a whole language model")
        info = self._tensors[name]
        if not is_known(info.kind):
            raise ValueError(
                f"{info.path}: {name} is of {info.quantisation}, which gguf {version('gguf')} does not dequantise; "
                "update that package, or quantise the model otherwise"
            )
        return info

    def quantisation(self, names: Iterable[str]) -> str:
        """How these are stored, such as "GGUF Q4_K and Q6_K", the most frequent first."""
        kinds = Counter(self._tensors[name].quantisation for name in names if name in self._tensors)
        return "GGUF " + " and ".join(kind for kind, _ in kinds.most_common())

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse tensors that are missing, of another shape or of an unknown type, by the header alone.

        Raises:
            ValueError: one is.
        """
        for name, shape in shapes.items():
            info = self.info(name)
            if info.shape != shape:
                raise ValueError(f"{info.path}: {name} is {info.shape}, expected {shape} by its header; fetch it again")


def opened_gguf(checkpoint: str, paths: Sequence[Path]) -> tuple[Header, GGUFTensors]:
    """The header of a file, or of the first part of a split one, and the tensors of all parts.

    Raises:
        ValueError: what `Header.of` refuses, or parts that are not of one model.
    """
    headers = [Header.of(path) for path in paths]
    count = headers[0].fields.get("split.count", 1)
    if count > 1 and count != len(paths):
        raise ValueError(
            f"{paths[0]}: the first of {count} parts; expected all, under names such as x-00001-of-{count:05}.gguf"
        )
    for number, header in enumerate(headers):
        if header.fields.get("split.no", 0) != number or header.fields.get("split.count", 1) != count:
            raise ValueError(f"{header.path}: no part {number + 1} of {count} of {paths[0].name}; fetch them again")
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    expected = headers[0].fields.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise ValueError(f"{paths[0]}: its parts hold {len(tensors)} tensors, expected {expected}; fetch them again")
    return headers[0], GGUFTensors(tensors, checkpoint)


def _unpacked(info: Info, rows: slice, columns: slice) -> Tensor:
    """Some rows and columns of a quantised tensor, whose first axes count as rows; float32."""
    block, size = _SIZES[info.kind]
    shape = (prod(info.shape[:-1]), info.shape[-1] // block * size)
    data = np.memmap(info.path, np.uint8, "r", info.start, shape)
    first, last = columns.start // block, -(-columns.stop // block)
    numbers = torch.from_numpy(dequantised(data[rows, first * size : last * size], info.kind))
    return numbers[:, columns.start - first * block : columns.stop - first * block]


def dequantised(blocks: np.ndarray, kind: int) -> np.ndarray:
    """Rows of blocks as float32, by the package `gguf`."""
    with np.errstate(all="ignore"):  # what is not finite is refused where it is used
        numbers = gguf.quants.dequantize(np.ascontiguousarray(blocks).reshape(1, -1), gguf.GGMLQuantizationType(kind))
    return numbers.reshape(len(blocks), -1)


@cache
def is_known(kind: int) -> bool:
    """Whether the package dequantises a type."""
    if kind in PLAIN or kind not in _SIZES:
        return kind in PLAIN
    try:
        dequantised(np.zeros((1, _SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
