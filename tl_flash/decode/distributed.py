"""The processes that torchrun starts: which share of the work each does, on which device, and when they wait."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from tl_flash.devices import device_of

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # the fastest process waits for the slowest; torchrun ends them all when one dies


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; alone, it is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device | None
    """Where this process computes; None leaves that to the weights."""

    @property
    def first(self) -> bool:
        """Whether this is the process that merges."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items, of which every process must hold the same list."""
        return items[self.rank :: self.size]

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Until every process has come here."""
        self.agree(None)
        if self.size > 1:
            dist.barrier()


@contextmanager
def ranks(device: str | torch.device | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started (nccl where they compute on CUDA, else gloo); without it, be alone.

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
    store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        store=_fresh(store, rank, size),
        rank=rank,
        world_size=size,
        timeout=_PATIENCE,
    )
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


def _fresh(store: Store, rank: int, size: int) -> Store:
    """A part of torchrun's store for this start alone.

    torchrun keeps one store for all restarts, in which the processes before left their addresses. So the first process
    names this start, and answers whoever says hello with that name until all have signed under it.
    """
    own = uuid.uuid4().hex
    others = range(1, size)
    if rank > 0:
        store.set(f"hello {rank}", own)
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
