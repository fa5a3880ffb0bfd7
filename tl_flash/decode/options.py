"""What a decode depends on beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tl_flash.lens import JacobianLens


@dataclass(frozen=True, eq=False)
class Options:
    """What `flash_decode` was asked for; its docstring says what each means, its signature what the defaults are."""

    side: str
    score: str
    k: int
    layers: Sequence[int] | None
    fold_ln: bool
    tokens: Sequence[str | int] | None
    ignore_tokens: Sequence[str | int] | None
    lens: JacobianLens | Literal["auto"] | None
    precision: str
    device: str | torch.device | None
    max_bytes: int | None
