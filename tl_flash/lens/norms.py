"""A norm as it answers, whatever the module calls its parameters, and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_LOUD, _QUIET = 2.0**10, 2.0**-10
"""Lengths of the probes a coordinate: beside the one no eps shows, beside the other every eps does."""


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm or RMSNorm: y = gain * n + bias, n = r x, r = 1 / sqrt(mean(x^2) + eps); of a centred x if `centre`.

    Its derivative at x is diag(gain) r (1 - n n' / d), of a centred change if `centre`; n holds eps, so this is exact.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centre: bool
    eps: float

    @classmethod
    def probe(cls, module: Callable[[Tensor], Tensor], like: Float[Tensor, "... d_model"]) -> Norm:
        """What a norm does, from its answers to a few vectors of the dtype and on the device of `like`.

        The probes hold as many 1s as -1s (one more of odd widths), so that centring and squaring are exact.
        """
        signs = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
        signs[::2] = -1

        def answer(vector: Tensor) -> Tensor:
            with torch.no_grad():
                return module(vector[None, None])[0, 0].to(torch.promote_types(like.dtype, torch.float32))

        loud, shifted = answer(_LOUD * signs), answer(_LOUD * (signs + 1))
        opposite = answer(-_LOUD * signs)
        centre = bool((shifted - loud).abs().max() < (loud - opposite).abs().max() / 8)
        exact = signs.to(loud.dtype)
        exact = exact - exact.mean() if centre else exact
        gain = (loud - opposite) / 2 / (exact / exact.square().mean().sqrt())
        quiet = (answer(_QUIET * signs) - answer(-_QUIET * signs)) / 2
        length = (quiet @ (gain * exact * _QUIET)) / (quiet @ quiet)
        eps = float(length.square() - (exact * _QUIET).square().mean())
        return cls(gain, (loud + opposite) / 2, centre, max(eps, 0.0))

    def unit(self, x: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, "... d_model"], Tensor]:
        """The normalised x, n, and r."""
        if self.centre:
            x = x - x.mean(-1, keepdim=True)
        r = (x.square().mean(-1) + self.eps).rsqrt()
        return x * r[..., None], r

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Its answer y."""
        return self.unit(x)[0] * self.gain + self.bias

    def after(self, matrix: Float[Tensor, "*text d_model d"]) -> Float[Tensor, "*text d_model d"]:
        """The gain and the centring on the output of a matrix that lacks them."""
        if self.centre:
            matrix = matrix - matrix.mean(-2, keepdim=True)
        return self.gain[:, None] * matrix
