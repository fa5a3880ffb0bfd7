"""The null that a neuron is compared with: directions without any neuron's structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.maps.later import Later


@dataclass(frozen=True, eq=False)
class Null:
    """Top z-scores and kurtosis of directions that shuffle each coordinate over a layer's neurons, sorted upwards.

    Where not all draws were decoded, those that were stand for them, some for several. Each is given, or what makes it
    when it is first asked for.
    """

    z: Float[Tensor, "layer draw"]
    kurtosis: Float[Tensor, "layer draw"]

    def quantile(self, quantile: float = 0.999, of: str = "z") -> Float[Tensor, " layer"]:
        """The value that this share of a layer's null directions stays under, for "z" or "kurtosis".

        Raises:
            ValueError: a share that so few draws cannot give, or another name.
        """
        if of not in ("z", "kurtosis"):
            raise ValueError(f'of: expected "z" or "kurtosis", got {of!r}')
        draws: Tensor = getattr(self, of)
        most = 1 - 1 / draws.shape[1]
        if not 0 <= quantile <= most:
            raise ValueError(f"quantile: expected 0 to {most:.5f} ({draws.shape[1]} draws a layer), got {quantile}")
        return torch.nanquantile(draws.double(), quantile, dim=1).float()  # NaN: a draw of a layer's zeros alone


for name in ("z", "kurtosis"):
    Later.attach(Null, name)
