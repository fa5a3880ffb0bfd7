"""Where one thing lies that a decode reads: the vectors of neurons, or the scale of a norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tl_flash.weights.probes import HeldTensors

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    """What a norm scales by: its weight and an offset, or nothing where it has no weight."""

    weight: str | None
    """Of a layer's norm the name within the layer; None: it only normalises."""
    offset: float
    """Gemma's norms scale by 1 + weight."""
    centre: bool
    """Whether it takes the mean off first, as LayerNorm does and RMSNorm does not."""

    def gain(self, tensors: Mapping[str, Tensor], prefix: str = "") -> Tensor | None:
        """The scale of each coordinate, float32 [d_model]; None where there is none.

        Raises:
            ValueError: the tensors are those of a model in memory, whose module is another norm.
        """
        if self.weight is None:
            return None
        gain = tensors[prefix + self.weight].detach().float() + self.offset
        if isinstance(tensors, HeldTensors):
            tensors.require_norm(prefix + self.weight, gain, self.centre)
        return gain

    def __str__(self) -> str:
        name = "no scale" if self.weight is None else self.weight + f" + {self.offset:g}" * (self.offset != 0)
        return f"{'LayerNorm' if self.centre else 'RMSNorm'} ({name})"


@dataclass(frozen=True)
class Place:
    """Where the vectors of neurons lie: in a tensor, or in one an expert."""

    tensor: str
    """Its name within the layer; "{}" stands for the number of the expert."""
    transposed: bool
    """Neurons are along the last axis, and not along the one before."""
    part: int = 0
    parts: int = 1
    """Of how many things that share the tensor this is which."""
    interleaved: bool = False
    """They take turns, neuron by neuron; else each lies in one piece."""

    def rows(self, tensor: Tensor) -> Tensor:
        """The neurons in a tensor, a row each: [neuron, d_model], or [expert, neuron, d_model]."""
        neurons = tensor.mT if self.transposed else tensor
        if self.interleaved:
            return neurons[..., self.part :: self.parts, :]
        return neurons if self.parts == 1 else neurons.chunk(self.parts, dim=-2)[self.part]

    def shape(self, d_mlp: int, d_model: int) -> Shape:
        """The shape of a tensor that holds so many neurons."""
        shape = (self.parts * d_mlp, d_model)
        return shape[::-1] if self.transposed else shape

    def d_mlp(self, shape: Shape) -> int:
        """How many neurons a tensor of this shape holds."""
        return shape[-1 if self.transposed else -2] // self.parts

    def __str__(self) -> str:
        if self.parts == 1:
            return self.tensor
        which = ("even", "odd") if self.interleaved else ("first half of the", "last half of the")
        return f"{self.tensor}, {which[self.part]} {'columns' if self.transposed else 'rows'}"
