"""What every way to make a lens gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
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


class OverTexts:
    """The sums of some texts' Jacobians and of their squares: what is known so far of the mean over texts."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.total, self.squares = torch.zeros(2, n_layers, d_model, d_model, dtype=torch.float64)
        self.texts = 0

    def add(self, layers: slice, rows: slice, jacobian: Float[Tensor, "text layer row d_model"]) -> None:
        """Take in some rows of some texts' Jacobians of some layers; when all are in, `texts` is to be raised."""
        self.total[layers, rows] += jacobian.sum(0, dtype=torch.float64).cpu()
        self.squares[layers, rows] += jacobian.double().square_().sum(0).cpu()

    def mean(self) -> Float[Tensor, "layer d_model d_model"]:
        """Over texts."""
        return self.total / self.texts

    def stderr(self) -> Float[Tensor, "layer d_model d_model"]:
        """Of the mean; NaN of one text."""
        n = self.texts
        spread = (self.squares / n - self.mean().square()).clamp(min=0)
        return (spread / (n - 1)).sqrt() if n > 1 else torch.full_like(spread, torch.nan)

    def error(self) -> float:
        """The largest over layers of the standard error's length over the mean's; infinite of one text."""
        errors = self.stderr().flatten(1).norm(dim=1) / self.mean().flatten(1).norm(dim=1)
        return float(errors.nan_to_num(nan=torch.inf).max())
