"""Tensors whose numbers are packed on a disk: sliced, turned and split as any tensor, unpacked when they are used."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Unpack = Callable[[slice, slice], Tensor]
"""Some rows and columns of a matrix, as numbers of their own."""

_AT_ONCE = 2**21
"""Numbers that are unpacked at a time, more or less."""
_BLOCK = 256
"""Numbers of a row that formats unpack together, if only one is asked for; none has more."""
_KEPT, _LARGE = 2, 2**25
"""Boxes that are kept as they were last unpacked, since a decode asks for each more than once; none of more numbers."""

_VIEWS = {
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.unbind.int,
}


class Packed(Tensor):
    """A view of a matrix, or of a stack of them, that is unpacked a box of rows and columns at a time.

    Views of it are such views again. Rows taken by a slice are read, as are all by any operation that needs numbers.
    """

    _unpack: Unpack
    _columns: int

    @staticmethod
    def of(shape: tuple[int, ...], unpack: Unpack, dtype: torch.dtype = torch.float32) -> Packed:
        """A packed tensor.

        Args:
            shape: of the tensor; all but the last axis count as rows of one matrix.
            unpack: reads a box of that matrix.
            dtype: of what it gives.
        """
        return Packed._like(torch.empty(shape, dtype=dtype, device="meta"), unpack, shape[-1])

    @staticmethod
    def _like(place: Tensor, unpack: Unpack, columns: int) -> Packed:
        view: Packed = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            Packed,
            place.shape,
            strides=place.stride(),
            storage_offset=place.storage_offset(),
            dtype=place.dtype,
            device=torch.device("cpu"),
        )
        view._unpack, view._columns = unpack, columns
        return view

    def __getitem__(self, index: Any) -> Tensor:
        view = super().__getitem__(index)
        return view.unpacked() if isinstance(index, slice) and isinstance(view, Packed) else view

    def unpacked(self) -> Tensor:
        """The numbers."""
        row, column = divmod(int(self.storage_offset()), self._columns)
        rows = columns = 1
        if self.numel() == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        for size, stride in zip(self.shape, self.stride(), strict=True):
            if stride % self._columns == 0:
                rows += (size - 1) * stride // self._columns
            else:
                columns += (size - 1) * stride
        box = self._unpack(slice(row, row + rows), slice(column, column + columns))
        strides = [
            stride // self._columns * columns if stride % self._columns == 0 else stride for stride in self.stride()
        ]
        return box.as_strided(self.shape, strides)

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return args[0].unpacked()
        if func in _VIEWS and isinstance(args[0], Packed):
            own, rest = args[0], args[1:]
            place = torch.empty_strided((0,), (1,), dtype=own.dtype, device="meta").as_strided(
                own.shape, own.stride(), own.storage_offset()
            )
            views = func(place, *rest, **(kwargs or {}))
            return tree_map_only(Tensor, lambda view: Packed._like(view, own._unpack, own._columns), views)
        args, kwargs = tree_map_only(Packed, Packed.unpacked, (args, kwargs or {}))
        return func(*args, **kwargs)


class Boxes:
    """Boxes of many matrices, float32: unpacked a few rows at a time, the last ones kept."""

    def __init__(self, unpack: Callable[[Any], Unpack]) -> None:
        """By `unpack`, how a matrix is unpacked, by what it is known by."""
        self._unpack = unpack
        self._kept = lru_cache(_KEPT)(self._in_steps)

    def of(self, matrix: Hashable) -> Unpack:
        """The same of one matrix."""

        def unpack(rows: slice, columns: slice) -> Tensor:
            large = (rows.stop - rows.start) * (columns.stop - columns.start) > _LARGE
            box = self._in_steps if large else self._kept
            return box(matrix, rows.start, rows.stop, columns.start, columns.stop)

        return unpack

    def _in_steps(self, matrix: Hashable, top: int, bottom: int, left: int, right: int) -> Tensor:
        unpack, out = self._unpack(matrix), torch.empty(bottom - top, right - left, dtype=torch.float32)
        step = _AT_ONCE // max(_BLOCK, min(right - left, _AT_ONCE))
        for start in range(top, bottom, step):
            stop = min(start + step, bottom)
            out[start - top : stop - top] = unpack(slice(start, stop), slice(left, right))
        return out
