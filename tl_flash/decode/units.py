"""Units of work, which any process may do in any order, and what each gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from tl_flash.weights import Sums

BLOCK = 4096
"""Neurons of a unit at most. It must not depend on the machine: a fingerprint is made of blocks."""


class Unit(NamedTuple):
    """Neurons of one layer that are decoded together."""

    layer: int
    start: int
    stop: int
    null: bool
    """Whether the layer's null is decoded with them."""

    @property
    def neurons(self) -> slice:
        """Which of the layer's neurons."""
        return slice(self.start, self.stop)

    def __str__(self) -> str:
        return f"layer {self.layer}, neurons {self.start} to {self.stop - 1}"


@dataclass(frozen=True, eq=False)
class Part:
    """What decoding one unit gave."""

    unit: Unit
    digest: str
    """Of the weights decoded, as held."""
    repaired: int
    tensors: dict[str, Tensor]
    """ids, logits, write_z [pole, neuron, k], log_z [pole, neuron], norm, mean, std, kurtosis [neuron] and tracked
    [neuron, token]; with the null, null.z and null.kurtosis [draw], sorted upwards."""


class Ready(NamedTuple):
    """A unit ready to decode."""

    unit: Unit
    sums: Sums
    rows: Float[Tensor, "n d_model"]
    norm: Float[Tensor, " n"] | None
    writes: Float[Tensor, "n d_model"]
