"""Norms among the calls of a trace: known by what they answer, and named by the parameter that they scale by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_flash.weights.calls import Call, Unreadable, doubled
from tl_flash.weights.places import Norm
from tl_flash.weights.probes import unit

_TOLERANCE = 1e-4  # norms add an eps to the mean square
_PLAIN = 1e-3


@dataclass(frozen=True, eq=False)
class SeenNorm:
    """What a norm was seen to do: unit(x) * gain + bias."""

    call: Call
    gain: Tensor
    centre: bool

    def named(self, path: str) -> Norm:
        """By the name of its weight within the module of this path.

        Raises:
            Unreadable: it scales by something else.
        """
        for name, parameter in self.call.module.named_parameters(recurse=False):
            if parameter.shape != self.gain.shape:
                continue
            offset = self.gain - parameter.detach().double()
            if float(offset.std()) < _PLAIN:
                weight = f"{self.call.path}.{name}".removeprefix(f"{path}.")
                return Norm(weight, float(round(float(offset.mean()), 2)), self.centre)
        if float((self.gain - 1).abs().max()) < _PLAIN:
            return Norm(None, 0.0, self.centre)
        raise Unreadable(f"{self.call.path} scales by something else than its weight")


@torch.no_grad()
def as_norm(call: Call) -> SeenNorm | None:
    """The norm that a module is, by what it answers to random numbers; None where it is something else."""
    args, kwargs = call.given
    alone = len(args) == 1 and not kwargs and call.x.shape == call.y.shape and call.x.dtype == torch.float64
    if not alone or [*call.module.children()] or any(parameter.ndim > 1 for parameter in call.module.parameters()):
        return None
    d_model = call.x.shape[-1]
    x = 32 * torch.randn(1, 8, d_model, generator=torch.Generator().manual_seed(0), dtype=call.x.dtype)
    with doubled():
        y = call.module(x if call.x.ndim == 3 else x[0]).reshape(8, d_model)
    for centre in (False, True):
        u = unit(x[0], centre)
        du, dy = u - u.mean(0), y - y.mean(0)
        gain = (du * dy).sum(0) / du.square().sum(0)
        if float((dy - gain * du).abs().max()) <= _TOLERANCE * float(dy.abs().max()):
            return SeenNorm(call, gain, centre)
    return None
