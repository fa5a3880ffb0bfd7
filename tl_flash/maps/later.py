"""Parts of a result that are made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Later:
    """An attribute that is given, or what makes it: a function without arguments, called once when it is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    @classmethod
    def attach(cls, owner: type, name: str) -> None:
        """Let a field of a dataclass be one."""
        setattr(owner, name, cls(name))

    def __get__(self, holder: Any, owner: type) -> Any:
        if holder is None:
            return self
        held = holder.__dict__[self._name]
        if callable(held):
            held = holder.__dict__[self._name] = held()
        return held

    def __set__(self, holder: Any, given: Any) -> None:
        holder.__dict__[self._name] = given


def while_unchanged(make: Callable[[], T], of: Tensor, what: str) -> Callable[[], T]:
    """Make something of a tensor later, once, if the tensor was not changed in place until then.

    Raises:
        ValueError: once called, if it was.
    """
    version = of._version

    @cache
    def made() -> T:
        if of._version != version:
            raise ValueError(
                f"{what}: it is made when first asked for, of an unembedding that was changed since; decode again, and "
                "save the map, or read this of it, before W_U is changed"
            )
        return make()

    return made
