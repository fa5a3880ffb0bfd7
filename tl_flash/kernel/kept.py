"""What was found of an unembedding, kept for its next decode.

It is held as long as the weights themselves, by their storage, and is of use only while these are as they were: the
version that torch counts, and the sum of all bits, since writing through `.data` is not counted. To take that sum is to
read all weights, which a decode of few directions does not: what it keeps it checks by their scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HELD: dict[int, tuple[weakref.ref[Any], dict[Hashable, Kept]]] = {}


@dataclass(eq=False)
class Kept:
    """What was found of one W_U."""

    state: tuple[int, int | None]
    found: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def summed(self) -> bool:
        """Whether all weights were read to see that they are as they were."""
        return self.state[1] is not None

    def once(self, name: Hashable, find: Callable[[], Any]) -> Any:
        """What `find` returns, or returned before."""
        if name not in self.found:
            self.found[name] = find()
        return self.found[name]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(getattr(each, "nbytes", 0) for each in self.found.values())


def kept(W_U: Tensor, how: Hashable = None, *, summed: bool = True) -> Kept:
    """What was found of W_U, looked at in this way; empty where it is new, or was changed.

    `summed` False goes by torch's version alone, and keeps apart from the rest what is found so.
    """
    if W_U.is_inference():
        return Kept((0, 0 if summed else None))
    storage = W_U.untyped_storage()
    held = _HELD.get(id(storage))
    if held is None or held[0]() is not storage:
        gone = id(storage)
        held = _HELD[gone] = weakref.ref(storage, lambda _: _HELD.pop(gone, None)), {}
    key = W_U.storage_offset(), W_U.shape, W_U.stride(), W_U.dtype, how, summed
    state = W_U._version, int(W_U.view(_WHOLE[W_U.element_size()]).sum()) if summed else None
    if key not in held[1] or held[1][key].state != state:
        held[1][key] = Kept(state)
    return held[1][key]


def held_bytes() -> int:
    """Bytes that are kept for unembeddings that are alive, beside their weights."""
    return sum(each.nbytes for _, of in _HELD.values() for each in of.values())


def forget() -> None:
    """Let go of all that is kept."""
    _HELD.clear()
