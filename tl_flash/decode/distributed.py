"""The processes that torchrun starts: which share of the work each does, on which device, and when they wait."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from tl_flash.devices import device_of

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; alone, it is rank 0 of 1.

    They meet through torchrun's store alone: what they tell each other is a list and a word, and a process group's
    threads can outlive the interpreter and abort the process at its end.
    """

    rank: int
    size: int
    device: torch.device | None
    """Where this process computes; None leaves that to the weights."""
    store: Store | None = field(default=None, compare=False)
    """What torchrun keeps for its processes; None alone."""
    _meetings: Iterator[int] = field(default_factory=count, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that merges."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items, of which every process must hold the same list."""
        return items[self.rank :: self.size]

    def agree(self, value: T) -> T:
        """The first process's value (something that JSON keeps), in every process."""
        if self.store is None:
            return value
        key = f"meeting {next(self._meetings)}"
        if self.first:
            self.store.set(key, json.dumps(value))
            return value
        _await(self.store, [key])
        return json.loads(self.store.get(key))

    def wait(self) -> None:
        """Until every process has come here; torchrun ends them all when one dies."""
        if self.store is None:
            return
        meeting = next(self._meetings)
        self.store.set(f"meeting {meeting} {self.rank}", "here")
        _await(self.store, [f"meeting {meeting} {rank}" for rank in range(self.size)])

    def part(self) -> None:
        """Meet no more; the first process, which may be the store's host, stays until all others have parted."""
        if self.store is None:
            return
        self.store.set(f"parted {self.rank}", "here")
        if self.first:
            _await(self.store, [f"parted {rank}" for rank in range(self.size)])


@contextmanager
def ranks(device: str | torch.device | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without it, be alone.

    Args:
        device: where to compute; by default, and for a plain "cuda", each process of a machine takes a CUDA device of
            its own, if there are any.

    Raises:
        ValueError: an unknown device, or more processes on this machine than CUDA devices.
    """
    together = dist.is_torchelastic_launched()
    chosen = torch.device("cuda") if together and str(device) == "cuda" else device_of(device)
    if not together:
        yield Ranks(0, 1, chosen)
        return
    if chosen is None:
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda":
        chosen = _own_device(chosen)
        torch.cuda.set_device(chosen)
    store, rank, size = next(rendezvous("env://"))
    group = Ranks(rank, size, chosen, _fresh(store, rank, size))
    yield group
    group.part()


def _await(store: Store, keys: Iterable[str]) -> None:
    """Until the store has all keys, however long: Ctrl-C ends it, as it would not end the store's own waiting."""
    for key in keys:
        while not store.check([key]):
            time.sleep(0.05)


def _fresh(store: Store, rank: int, size: int) -> Store:
    """A part of torchrun's store for this start alone.

    torchrun keeps one store for all restarts, in which the processes before left their addresses. So the first process
    names this start, and answers whoever says hello with that name until all have signed under it.
    """
    own = uuid.uuid4().hex
    others = range(1, size)
    if rank > 0:
        store.set(f"hello {rank}", own)
        _await(store, [f"welcome {own}"])
        start = store.get(f"welcome {own}").decode()
        store.set(f"{start} {rank}", "here")
        return PrefixStore(start, store)
    while not all(store.check([f"{own} {other}"]) for other in others):
        for hello in (f"hello {other}" for other in others):
            if store.check([hello]):
                store.set(f"welcome {store.get(hello).decode()}", own)
        time.sleep(0.05)
    return PrefixStore(own, store)


def _own_device(device: torch.device) -> torch.device:
    if device.index is not None:
        return device
    own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if own >= count:
        raise ValueError(f"device: process {own} of this machine found {count} CUDA devices; start at most {count}")
    return torch.device("cuda", own)
