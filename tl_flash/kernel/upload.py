"""Bring directions to the device while it works."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts


def uploaded(x: Tensor, rows: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Tiles of x on `device`, with their places; from host memory each is copied while the one before is worked on."""
    if x.is_cuda or device.type != "cuda":
        yield from ((part, x[part].to(device)) for part in parts(len(x), rows))
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copy(part: slice) -> tuple[slice, Tensor, torch.cuda.Event]:
        copied = torch.cuda.Event()
        with torch.cuda.stream(copying):
            tile = x[part].to(device, non_blocking=True)
            copied.record()
        return part, tile, copied

    ahead = None
    for part in parts(len(x), rows):
        here, ahead = ahead, copy(part)
        if here is not None:
            yield _received(*here, computing)
    if ahead is not None:
        yield _received(*ahead, computing)


def _received(part: slice, tile: Tensor, copied: torch.cuda.Event, by: torch.cuda.Stream) -> tuple[slice, Tensor]:
    by.wait_event(copied)
    tile.record_stream(by)
    return part, tile
