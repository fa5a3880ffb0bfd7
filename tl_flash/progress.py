"""Progress of long work: a bar, or whoever watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
Watcher = Callable[[str, int, int | None], None]
"""Told what is done, how much of it, and of how much in all (None where nothing says)."""
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def track(items: Iterable[T], what: str, progress: bool | None, total: int | None = None) -> Iterable[T]:
    """Go through items with a bar; None shows one on a terminal or in a notebook alone, or tells who watches."""
    watcher = _watcher.get()
    if watcher is not None:
        return _watched(items, what, watcher, total)
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(items, desc=what, disable=not progress, total=total, leave=False)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside the context, and in this thread, long work tells `watcher` before each of its steps and draws no bar.

    What the watcher raises ends the work.

    Example:
        >>> from tl_flash.progress import track, watching
        >>> seen = []
        >>> with watching(lambda what, done, total: seen.append((what, done, total))):
        ...     letters = list(track("ab", "spelling", None))
        >>> seen
        [('spelling', 0, 2), ('spelling', 1, 2), ('spelling', 2, 2)]
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def _watched(items: Iterable[T], what: str, watcher: Watcher, total: int | None) -> Iterator[T]:
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    done = 0
    for item in items:
        watcher(what, done, total)
        yield item
        done += 1
    watcher(what, done, total)
