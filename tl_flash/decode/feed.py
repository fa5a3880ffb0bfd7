"""Units on their way through the engine, the next one's weights read while one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from tl_flash.decode.units import Ready

T = TypeVar("T")


class Feed:
    """Units on their way through the engine; one that cannot be read ends the feed, and those before it are done."""

    def __init__(self, reads: Iterator[Ready], *, ahead: bool) -> None:
        """`ahead`: make each while the one before is computed."""
        self.waiting: deque[Ready] = deque()
        self.failure: ValueError | OSError | None = None
        self._reads = made_ahead(reads, ahead)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        while True:
            try:
                read = next(self._reads, None)
            except (ValueError, OSError) as error:
                self.failure = error
                return
            if read is None:
                return
            self.waiting.append(read)
            yield read.rows, read.norm


def made_ahead(items: Iterator[T], ahead: bool = True) -> Iterator[T]:
    """Make each item, none of them None, while the one before is in use: in a thread, one ahead and no more.

    Products of matrices are cut evenly over all cores and wait for the slowest, so the thread takes few of them.
    `ahead` False leaves all as it is.
    """
    if not ahead:
        yield from items
        return
    with ThreadPoolExecutor(1) as thread:
        threads = torch.get_num_threads()
        if "OpenMP" in torch.__config__.parallel_info():  # where each thread has a number of its own, ...
            thread.submit(_use_threads, max(threads // 4, 1)).result()
            torch.set_num_threads(threads)  # ... and the number told last is every new thread's
        made = thread.submit(next, items, None)
        while (item := made.result()) is not None:
            made = thread.submit(next, items, None)
            yield item


def _use_threads(count: int) -> None:
    torch.get_num_threads()  # a thread takes the common number when it first asks
    torch.set_num_threads(count)
