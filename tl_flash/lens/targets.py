"""Which positions of a text count, and what is read there."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.lens.norms import Norm

FIRST = 8
"""The position from which on the output counts; of shorter texts the last one does."""


def first_target(length: int) -> int:
    """From which position on the output of a text of this length counts."""
    return min(FIRST, length - 1)


def normalised(model: Any, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """The final residual stream through the final norm without its scale, at least float32."""
    residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
    norm = final_norm(model)
    return residual if norm is None else norm.unit(residual)[0]


def final_norm(model: Any) -> Norm | None:
    """The norm before the unembedding, of a model that has one."""
    norm = getattr(model, "ln_final", None)
    return None if norm is None else Norm.probe(norm, model.W_U[:, 0])
