"""What a quantised matrix is in safetensors: several tensors under names of their own, and how a box of it is unpacked.

Each format of `formats/` says which tensors belong together and what they mean; here is what several have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tl_flash.weights.formats.packed import Unpack

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Four-bit floats by their bits (OCP Microscaling Formats 1.0, section 5.3.3)."""
_BIAS = 127
"""Of the exponents that a byte alone holds (E8M0, the same, section 5.4.1)."""

Parts = Mapping[str, str]
"""The names of the tensors that a quantised one is made of, by what each is to it."""


class Stored(NamedTuple):
    """A quantised tensor."""

    shape: tuple[int, ...]
    """As it is unpacked; all but the last axis count as rows of one matrix."""
    unpack: Unpack
    """Gives float32."""
    transposed: bool = False
    """Whether the model has the last two axes the other way round."""

    @property
    def held(self) -> tuple[int, ...]:
        """The shape that the model has."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


class Format(Protocol):
    """One way to quantise, as a config.json describes it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """By its quantization_config.

        Raises:
            ValueError: a variant that is not known.
        """
        ...

    def parts(self, names: Iterable[str]) -> dict[str, Parts]:
        """Of each quantised tensor, by the name that the model has for it, those of its parts that are there."""
        ...

    def label(self, parts: Parts) -> str:
        """What a tensor's quantisation is called, such as "GPTQ int4"."""
        ...

    def stored(self, parts: Mapping[str, Tensor]) -> Stored:
        """The tensor that these parts are.

        Raises:
            KeyError: a part is missing.
            ValueError: the parts do not fit together, or are of another version.
        """
        ...


def ending(names: Iterable[str], marks: Mapping[str, str], among: Mapping[str, str]) -> dict[str, Parts]:
    """The quantised tensors of whose parts one ends so.

    Args:
        names: of all tensors in the checkpoint.
        marks: by the end of the part that tells a quantised tensor, the end of the tensor's own name.
        among: by what a part is, the end of its name in the place of these.
    """
    held, found = set(names), {}
    for name in held:
        for mark, own in marks.items():
            if name.endswith(mark):
                stem = name.removesuffix(mark)
                parts = {part: stem + end for part, end in among.items()}
                found[stem + own] = {part: whole for part, whole in parts.items() if whole in held}
    return found


class Grid:
    """Numbers that hold for blocks of a matrix each: scales, zero points."""

    def __init__(self, values: Tensor, shape: Sequence[int], blocks: Iterable[Sequence[int]]) -> None:
        """Lay them out.

        Args:
            values: one a block [.., rows, columns], one a row [rows], one a matrix [..] or one in all.
            shape: of the matrix, or of the stack of them.
            blocks: rows and columns that a block may have, beside one that is a row, or all.

        Raises:
            ValueError: they fit no blocks.
        """
        if len(shape) < 2:
            raise ValueError(f"is {tuple(shape)}, expected a matrix")
        *stack, rows, columns = shape
        given = tuple(values.shape)
        if values.numel() == 1:
            values = values.reshape(1, 1)
        elif given == (tuple(stack) or (rows,)):
            values = values.reshape(*stack, -1, 1)
        elif len(given) != len(shape) or [*given[:-2]] != stack:
            raise ValueError(f"is scaled by {given}, expected one scale a block of {tuple(shape)}")
        high, wide = values.shape[-2:]
        known = [*blocks, (rows, columns), (1, columns)]
        fits = [(tall, broad) for tall, broad in known if (-(-rows // tall), -(-columns // broad)) == (high, wide)]
        if not fits:
            sizes = ", ".join(f"{tall} x {broad}" for tall, broad in known)
            raise ValueError(f"is scaled by {given}, expected one scale a block of {tuple(shape)}, of {sizes}")
        self._block = fits[0]
        self._values, self._rows, self._high = values.expand(*stack, high, wide).reshape(-1, wide), rows, high

    def at(self, rows: slice, columns: slice) -> Tensor:
        """Of every number in a box, float32."""
        row, column = torch.arange(rows.start, rows.stop), torch.arange(columns.start, columns.stop)
        row = row // self._rows * self._high + row % self._rows // self._block[0]
        return floats(self._values[row])[:, column // self._block[1]]


def floats(numbers: Tensor) -> Tensor:
    """Scales as float32; a byte is an exponent of two."""
    if numbers.dtype == torch.uint8:
        return torch.ldexp(torch.ones(numbers.shape), exponents(numbers))
    return numbers.float()


def exponents(numbers: Tensor) -> Tensor:
    """Of two, from bytes that hold nothing else; int32."""
    return numbers.int() - _BIAS


def halves(table: Tensor, *, upper_first: bool = False) -> Tensor:
    """What each byte stands for that holds two places in a table of 16, [256, 2]."""
    byte = torch.arange(256)
    places = torch.stack([byte >> 4, byte & 15] if upper_first else [byte & 15, byte >> 4], dim=-1)
    return table[places]


FLOAT_PAIRS = halves(torch.tensor(E2M1))
"""Two four-bit floats by the byte that holds them, the first in the lower half."""


def looked_up(packed: Tensor, columns: slice, pairs: Tensor = FLOAT_PAIRS) -> Tensor:
    """Some columns of rows whose bytes stand for two numbers each."""
    first, last = columns.start // 2, -(-columns.stop // 2)
    bytes_ = packed[:, first:last].view(torch.uint8)
    return pairs[bytes_.int()].flatten(-2)[:, columns.start - 2 * first : columns.stop - 2 * first]


def unpacked_words(words: Tensor, bits: int) -> Tensor:
    """Whole numbers of so many bits, packed along the last axis of int32 [.., words], the lowest bits first; float32.

    Those of 3 bits go on from one word into the next: 32 of them fill 3.
    """
    if 8 % bits == 0:
        bytes_ = words.contiguous().view(torch.uint8)
        mask = (1 << bits) - 1
        return torch.stack([bytes_ >> at & mask for at in range(0, 8, bits)], dim=-1).flatten(-2).float()
    at = torch.arange(32) * bits
    groups = words.unflatten(-1, (-1, bits)).long() & 0xFFFFFFFF
    wide = groups[..., at // 32] | groups[..., (at // 32 + 1).clamp(max=bits - 1)] << 32
    return (wide >> at % 32 & (1 << bits) - 1).flatten(-2).float()
