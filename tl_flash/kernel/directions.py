"""Directions ready to be scored: centred, times the gain, and measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tl_flash.kernel.unembedding import Unembedding


@dataclass(frozen=True)
class Directions:
    """A tile of directions, ready to score: s = rows . W_U (times u.column_scale under "cosine") - mean."""

    rows: Tensor
    #   float64 [n, d_model], gain * x_c (divided by ||x_c|| under "cosine")
    norm: Tensor
    #   float64 [n], ||x_c||, or what the caller gave in its place
    length: Tensor
    #   float64 [n], length of each of rows
    finite: Tensor
    #   bool [n]
    zero: Tensor
    #   bool [n], nothing is left after centring and gain; such rows are zero, their lengths 1
    u: Unembedding

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the scores over the vocabulary, float64 [n]."""
        return self.rows @ self.u.mean_column

    @classmethod
    def of(cls, x: Tensor, norm: Tensor | None, u: Unembedding) -> Directions:
        """Centre, apply the gain and measure x [n, d_model]."""
        x = x.detach().to(u.device, torch.float64)
        raw = torch.linalg.vector_norm(x, dim=1)
        x_c = x - x.mean(1, keepdim=True) if u.centre else x
        own = torch.linalg.vector_norm(x_c, dim=1) if u.centre else raw
        rows = x_c if u.gain is None else x_c * u.gain
        if u.score == "cosine":
            rows = rows / own[:, None]
        length = torch.linalg.vector_norm(rows, dim=1)
        given = own if norm is None else norm.to(u.device, torch.float64, non_blocking=True)
        finite = torch.isfinite(raw)
        zero = (own <= 1e-12 * raw) | ~(length > 0)  # a float64 mean leaves that much of a constant row
        zero = finite & (zero | (given == 0))
        rows = rows.masked_fill(zero[:, None], 0)
        given, length = given.masked_fill(zero, 1), length.masked_fill(zero, 1)
        return cls(rows, given, length, finite, zero, u)
