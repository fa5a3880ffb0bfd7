"""bitsandbytes: four-bit numbers from a table with a scale a block (NF4, FP4), and int8 with a scale a row.

In four bits `weight` holds two numbers a byte, the first in the upper half, row after row whatever the shape, which
`quant_state.bitsandbytes__nf4` (JSON in bytes) tells; `quant_map` is the table, `absmax` the scales, one a run of
`blocksize` numbers. Quantised themselves ("double quant"), these are bytes: places in `nested_quant_map`, scaled by
`nested_absmax` and shifted by `nested_offset`. In eight bits a row is scaled by SCB / 127.
https://github.com/bitsandbytes-foundation/bitsandbytes, whose functions the tests compare these with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from tl_flash.weights.formats.quantised import Parts, Stored, ending, halves, looked_up

_STATE = "quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_FOUR = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(_STATE + kind for kind in _KINDS))
_PER_127 = 7.874015718698502e-3
"""1 / 127, as the package has it."""


class BitsAndBytes:
    """See `Format`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        pass  # how each tensor is quantised its parts tell

    def parts(self, names: Iterable[str]) -> dict[str, Parts]:
        """See `Format`."""
        names = set(names)
        four = {part: f".{part}" for part in _FOUR} | {"weight": ""}
        eight = {part: f".{part}" for part in ("weight", "SCB", "weight_format")}
        marks = {f".{part}": "" for part in _FOUR}
        return ending(names, marks, four) | ending(names, {".SCB": ".weight"}, eight)

    def label(self, parts: Parts) -> str:
        """See `Format`."""
        return f"bitsandbytes {'int8' if 'SCB' in parts else _kind(parts).upper()}"

    def stored(self, parts: Mapping[str, Tensor]) -> Stored:
        """See `Format`."""
        return _eight_bits(parts) if "SCB" in parts else _four_bits(parts)


def _kind(parts: Iterable[str]) -> str:
    kinds = [kind for kind in _KINDS if _STATE + kind in parts]
    return kinds[0] if kinds else "4-bit"


def _eight_bits(parts: Mapping[str, Tensor]) -> Stored:
    weight, scales = parts["weight"], parts["SCB"]
    if weight.dtype != torch.int8 or weight.ndim != 2 or scales.shape != weight.shape[:1]:
        raise ValueError(
            f"is {weight.dtype} {tuple(weight.shape)} with SCB {tuple(scales.shape)}; expected int8, one a row"
        )
    form = parts["weight_format"].flatten().tolist() if "weight_format" in parts else [0]
    if form != [0]:
        raise ValueError(f"has weight_format {', '.join(map(str, form))}, expected 0, rows as they are")

    def unpack(rows: slice, columns: slice) -> Tensor:
        return weight[rows, columns] * scales[rows, None].float() * _PER_127

    return Stored(tuple(weight.shape), unpack)


def _four_bits(parts: Mapping[str, Tensor]) -> Stored:
    state = _state(parts[_STATE + _kind(parts)])
    shape, size = tuple(state["shape"]), state["blocksize"]
    packed, table, absmax = parts["weight"].reshape(-1).view(torch.uint8), parts["quant_map"], parts["absmax"]
    n_numbers, n_columns = prod(shape), shape[-1]
    if len(packed) != -(-n_numbers // 2) or absmax.shape != (-(-n_numbers // size),) or table.shape != (16,):
        raise ValueError(
            f"is {len(packed)} bytes with {len(absmax)} scales from a table of {len(table)}, expected "
            f"{-(-n_numbers // 2)} and {-(-n_numbers // size)} for a weight of {shape}, and 16"
        )
    if n_columns % 2:
        raise ValueError(f"has rows of {n_columns} numbers, expected an even number, so that each begins with a byte")
    scales = cache(_scales(parts, state))
    by_row, pairs = packed.view(-1, n_columns // 2), halves(table.float(), upper_first=True)
    run = gcd(n_columns, size)  # numbers of a row that have a scale in common
    first = torch.arange(0, n_columns, run)

    def unpack(rows: slice, columns: slice) -> Tensor:
        of_runs = scales()[(torch.arange(rows.start, rows.stop)[:, None] * n_columns + first) // size]
        return looked_up(by_row[rows], columns, pairs) * of_runs[:, torch.arange(columns.start, columns.stop) // run]

    return Stored(shape, unpack)


def _state(held: Tensor) -> dict[str, Any]:
    """What JSON in bytes says of a tensor."""
    try:
        state = json.loads(bytes(held.to(torch.uint8).tolist()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"has a quant_state that is no JSON ({error})") from error
    sizes = [state.get("blocksize"), *(state.get("shape") or [None])] if isinstance(state, dict) else [None]
    sizes += [state[name] for name in ("nested_blocksize",) if isinstance(state, dict) and name in state]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"has quant_state {state!r}, expected a shape and a blocksize")
    return state


def _scales(parts: Mapping[str, Tensor], state: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Reads them, one a block, float32."""
    scales = parts["absmax"]
    if scales.dtype != torch.uint8:
        return scales.float
    over, table, size = parts["nested_absmax"], parts["nested_quant_map"], state["nested_blocksize"]
    offset = state["nested_offset"]
    if over.shape != (-(-len(scales) // size),) or table.shape != (256,):
        raise ValueError(f"has {len(over)} nested_absmax for {len(scales)} absmax in blocks of {size}")

    def nested() -> Tensor:
        return table.float()[scales.int()] * over.float().repeat_interleave(size)[: len(scales)] + offset

    return nested
