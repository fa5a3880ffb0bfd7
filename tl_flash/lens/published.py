"""Lenses that TransformerLens fits or fetches, brought to what this package's mean."""

from __future__ import annotations

from typing import Any

import torch

from tl_flash.clamps import Prompts
from tl_flash.lens.estimate import Estimate
from tl_flash.lens.mean_field import MeanField, field_of
from tl_flash.weights import MLPWeights

_LEAST_AGREEMENT = 0.2
"""Cosine of what the blocks after a layer do to a change, by a lens of the model and by the mean-field one. Those of
one model are above it, those of two unrelated models about 0."""


def converted(
    theirs: Any, model: Any, weights: MLPWeights, texts: Prompts, batch_size: int
) -> tuple[Estimate, list[int]]:
    """Their matrices through the final norm, and the layers that these are of: theirs, and the last.

    Raises:
        TypeError: it holds no such matrices.
        ValueError: it is of another model, or of another layer than the last one's output.
    """
    _require_papers(theirs, model, weights)
    jacobians = {int(layer): matrix.detach().float() for layer, matrix in theirs.jacobians.items()}
    field = field_of(model, texts, batch_size)
    _require_agreement(jacobians, field, weights)
    final = field.final.parts[0][0].float().cpu()  # of the one class
    last = weights.n_layers - 1
    layers = sorted({*jacobians, last})
    J = torch.stack([final @ jacobians[layer].cpu() if layer in jacobians else final for layer in layers])
    return Estimate(J, torch.full_like(J, torch.nan), int(theirs.n_prompts), None), layers


_UNNAMED = (None, "", "custom")


def _require_papers(theirs: Any, model: Any, weights: MLPWeights) -> None:
    if not all(hasattr(theirs, name) for name in ("jacobians", "n_prompts", "metadata")):
        raise TypeError(
            "theirs: expected a JacobianLens of transformer_lens.tools.analysis, with .jacobians, .n_prompts and "
            f".metadata, got {type(theirs).__name__}"
        )
    widths = {tuple(matrix.shape) for matrix in theirs.jacobians.values()}
    if widths != {(weights.d_model, weights.d_model)}:
        raise ValueError(f"theirs: of matrices {sorted(widths)}, and this model's d_model is {weights.d_model}")
    last = weights.n_layers - 1
    beyond = [layer for layer in theirs.jacobians if not 0 <= layer < last]
    if beyond:
        raise ValueError(f"theirs: holds layers {beyond}; of this model it can hold 0 to {last - 1}, before the last")
    target = theirs.metadata.get("target_layer", last)
    if target != last:
        raise ValueError(f"theirs: carries to layer {target}; expected the last of this model, {last}")
    config = getattr(getattr(model, "original_model", None), "config", None)
    own = {
        "model_name": getattr(model.cfg, "model_name", None),
        "model_revision": getattr(config, "_commit_hash", None),
    }
    for name, mine in own.items():
        fitted = theirs.metadata.get(name)
        if fitted is not None and mine not in _UNNAMED and _bare(fitted) != _bare(mine):
            raise ValueError(f"theirs: fitted to {name} {fitted!r}, and this model's is {mine!r}; fetch or fit its own")


def _bare(name: Any) -> str:
    """Bridges name a model with its owner, HookedTransformer without."""
    return str(name).rsplit("/", 1)[-1].lower()


def _require_agreement(jacobians: dict[int, torch.Tensor], field: MeanField, weights: MLPWeights) -> None:
    """Refuse matrices that are unlike what the blocks of this model do, on the latest layer that they are of."""
    latest = max(jacobians)
    product = eye = torch.eye(weights.d_model)
    for block in field.blocks[latest + 1 :]:
        product = block.block().float().cpu() @ product
    ours, other = (product - eye).flatten(), (jacobians[latest].cpu() - eye).flatten()
    agreement = float(ours @ other / (ours.norm() * other.norm()))
    if not agreement > _LEAST_AGREEMENT:
        raise ValueError(
            f"theirs: at layer {latest} it agrees with this model's own blocks by {agreement:.2f} (cosine; expected "
            f"above {_LEAST_AGREEMENT}), so it was fitted to another model, or to other weights of it"
        )
