"""What every way to make a lens gives."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Estimate(NamedTuple):
    """A lens of some layers, without its papers."""

    J: Float[Tensor, "layer d_model d_model"]
    stderr: Float[Tensor, "layer d_model d_model"]
    prompts: int
    """How many texts it is of: all that were given, unless fewer sufficed."""
    tokens: int | None
    """How many they have in all; None where that is not known."""
    measured: tuple[int, ...] = ()
    """Layers whose block has no closed form."""
