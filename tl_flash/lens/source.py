"""Where a lens comes from, and of which model it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.weights import MLPWeights

_SAMPLES = 64


@dataclass(frozen=True)
class LensSource:
    """Where a lens comes from."""

    model: str
    dtype: str
    method: str
    """ "mean_field", "exact" or "mixed" (`jacobian_lens`), or "published" (`JacobianLens.of`)."""
    prompts: int
    tokens: int | None
    measured: tuple[int, ...] = ()
    """Layers whose block has no closed form, so that its own mean Jacobian was measured row by row (mean-field)."""
    seconds: float | None = None
    """How long it took."""

    @property
    def made(self) -> str:
        """The method, and of how many texts."""
        return f"{self.method}, {self.prompts} texts"

    @classmethod
    def of_header(cls, kept: Mapping[str, Any]) -> LensSource:
        """What a file says; those of format 1 were all exact, and said of which positions."""
        fields = {"method": "exact", **kept, "measured": tuple(kept.get("measured", ()))}
        fields.pop("positions", None)
        return cls(**fields)


def signature(weights: MLPWeights) -> Float[Tensor, "matrix sample"]:
    """Some entries of each layer's folded directions and of the folded unembedding, the same however it was loaded."""

    def sample(matrix: Tensor) -> Tensor:
        places = torch.linspace(0, matrix.numel() - 1, _SAMPLES).long()
        return matrix.flatten()[places.to(matrix.device)].float().cpu()

    rows = [sample(weights.directions(layer, side)) for layer in range(weights.n_layers) for side in ("in", "out")]
    columns = torch.linspace(0, weights.d_vocab - 1, _SAMPLES).long().to(weights.W_U.device)
    W_U = weights.W_U.detach()
    centred = W_U[:, columns].float() - W_U.mean(1, dtype=torch.float32)[:, None]
    if weights.final_gain is not None:
        centred = centred * weights.final_gain[:, None].to(centred.device)
    if weights.centre:
        centred = centred - centred.mean(0)
    return torch.stack([*rows, sample(centred)])
