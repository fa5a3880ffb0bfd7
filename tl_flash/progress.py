"""A progress bar on long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str, progress: bool | None, total: int | None = None) -> Iterable[T]:
    """Go through items with a bar; None shows one on a terminal or in a notebook alone."""
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(items, desc=what, disable=not progress, total=total, leave=False)
