"""Which positions of a text count, what is read there, and what the unembedding makes of it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.lens.norms import Norm
from tl_flash.weights import UnembeddingWeights

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


def folded_unembedding(weights: UnembeddingWeights) -> Float[Tensor, "d_model d_vocab"]:
    """W_U': the unembedding with the final norm's scale folded in, float32."""
    W_U = weights.W_U.detach().float()
    return W_U if weights.final_gain is None else weights.final_gain.float()[:, None] * W_U


def vocabulary_covariance(weights: UnembeddingWeights) -> Float[Tensor, "d_model d_model"]:
    """The covariance of the columns of W_U' over the vocabulary, float64 on the CPU; a LayerNorm centres them."""
    W_U = folded_unembedding(weights)
    W_U = W_U - W_U.mean(1, keepdim=True)
    if weights.centre:
        W_U = W_U - W_U.mean(0)
    return (W_U @ W_U.T / W_U.shape[1]).double().cpu()
