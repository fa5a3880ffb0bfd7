"""Where the models of one class keep their neurons: plain data, read of whatever holds tensors under these names."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from tl_flash.weights.mlp import Layer, Matrix, require_finite
from tl_flash.weights.places import Norm, Place, Shape


class Size(NamedTuple):
    """How many experts, None where there is one MLP, and how many neurons in each."""

    n_experts: int | None
    d_mlp: int


@dataclass(frozen=True)
class Neurons:
    """One MLP of a layer, or its experts."""

    up: Place
    gate: Place | None
    down: Place
    routed: bool
    """Whether these are experts of which a router chooses; their tensors are stacks, or one an expert."""
    norm: Norm | None = None
    """One over the neurons, between their activation and the down-projection (BitNet)."""

    @property
    def places(self) -> dict[str, Place]:
        """By the names of `Layer`."""
        places = {"W_in": self.up, "W_out": self.down}
        return places if self.gate is None else places | {"W_gate": self.gate}

    def size(self, shapes: Mapping[str, Shape], prefix: str) -> Size:
        """How many experts there are, and how wide each is, by the shapes of a model's stacks."""
        shape = shapes[prefix + self.down.tensor.format(0)]
        n_experts = shape[0] if len(shape) == 3 else None
        if "{}" in self.down.tensor:
            n_experts = self.n_experts(shapes, prefix, self.down.tensor)
        return Size(n_experts, self.down.d_mlp(shape))

    def shapes(self, size: Size, d_model: int) -> dict[str, Shape]:
        """The tensors that hold them, and the shape that each must have."""
        shapes: dict[str, Shape] = {}
        for place in self.places.values():
            shape = place.shape(size.d_mlp, d_model)
            if "{}" in place.tensor:
                shapes |= {place.tensor.format(expert): shape for expert in range(size.n_experts or 0)}
            else:
                shapes[place.tensor] = shape if size.n_experts is None else (size.n_experts, *shape)
        return shapes

    def n_experts(self, tensors: Container[str], prefix: str, name: str) -> int:
        """How many experts have a tensor of their own."""
        return len([*takewhile(lambda expert: prefix + name.format(expert) in tensors, count())])

    def read(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[Tensor, ...]]:
        """Every matrix [neuron, d_model], of each expert where there are several."""
        found = {name: tuple(self._matrices(tensors, prefix, place)) for name, place in self.places.items()}
        fewest = min(map(len, found.values()))  # a stack may end with what is no expert
        return {name: matrices[:fewest] for name, matrices in found.items()}

    def _matrices(self, tensors: Mapping[str, Tensor], prefix: str, place: Place) -> Iterator[Tensor]:
        if "{}" not in place.tensor:
            neurons = place.rows(tensors[prefix + place.tensor].detach())
            yield from neurons.unbind() if neurons.ndim == 3 else (neurons,)
            return
        for expert in range(self.n_experts(tensors, prefix, place.tensor)):
            yield place.rows(tensors[prefix + place.tensor.format(expert)].detach())

    def __str__(self) -> str:
        gate = "" if self.gate is None else f"gate {self.gate}; "
        norm = "" if self.norm is None else f"norm {self.norm}; "
        return f"up {self.up}; {gate}{norm}down {self.down}"


@dataclass(frozen=True)
class LayerLayout:
    """One layer; without neurons where it has no MLP that reads and writes the residual stream."""

    neurons: tuple[Neurons, ...] = ()
    """The routed experts before the shared ones."""
    pre: Norm | None = None
    """The norm that they read; None: the stream itself."""
    post: tuple[Norm, ...] = ()
    """Those that what they write passes on its way into the stream."""
    fault: str | None = None
    """Why its neurons cannot be read."""

    @property
    def norms(self) -> list[str]:
        """The weights of its norms of the residual stream, within the layer."""
        return [norm.weight for norm in (self.pre, *self.post) if norm is not None and norm.weight is not None]

    def read(self, tensors: Mapping[str, Tensor], prefix: str) -> Layer:
        """Put the layer together."""
        gains = [gain for norm in self.post if (gain := norm.gain(tensors, prefix)) is not None]
        return self.put_together(
            [neurons.read(tensors, prefix) for neurons in self.neurons],
            gain_pre=None if self.pre is None else self.pre.gain(tensors, prefix),
            gain_post=torch.stack(gains).prod(0) if gains else None,
            gain_neurons=None if self.of_neurons is None else self.of_neurons.gain(tensors, prefix),
        )

    @property
    def of_neurons(self) -> Norm | None:
        """The norm over its neurons."""
        return next((neurons.norm for neurons in self.neurons if neurons.norm is not None), None)

    def put_together(
        self,
        parts: list[dict[str, tuple[Tensor, ...]]],
        *,
        gain_pre: Tensor | None,
        gain_post: Tensor | None,
        gain_neurons: Tensor | None,
    ) -> Layer:
        """The layer of what each of its neurons' places holds."""
        names = [*parts[0]]
        if len(parts) > 1:
            parts = [parts[0], *(_as_experts(part, len(parts[0]["W_in"][0])) for part in parts[1:])]
        matrices: dict[str, Matrix] = {name: tuple(m for part in parts for m in part[name]) for name in names}
        if len(self.neurons) == 1 and not self.neurons[0].routed:
            matrices = {name: matrix[0] for name, matrix in matrices.items()}
        return Layer(
            **matrices,  # pyright: ignore[reportArgumentType] - the names are its fields
            gain_pre=gain_pre,
            gain_post=gain_post,
            centre_pre=self.pre is not None and self.pre.centre,
            gain_neurons=gain_neurons,
            centre_post=any(norm.centre for norm in self.post),
            centre_neurons=self.of_neurons is not None and self.of_neurons.centre,
        )

    def shapes(self, prefix: str, sizes: Sequence[Size], d_model: int) -> dict[str, Shape]:
        """The tensors that it needs, and the shape that each must have."""
        shapes: dict[str, Shape] = {norm: (d_model,) for norm in self.norms}
        for neurons, size in zip(self.neurons, sizes, strict=True):
            shapes |= neurons.shapes(size, d_model)
            if neurons.norm is not None and neurons.norm.weight is not None:
                shapes[neurons.norm.weight] = (size.d_mlp,)
        return {prefix + name: shape for name, shape in shapes.items()}

    def __str__(self) -> str:
        if self.fault is not None:
            return f"cannot be read: {self.fault}"
        if not self.neurons:
            return "no MLP"
        kinds = ["routed" if one.routed else "shared" if len(self.neurons) > 1 else "dense" for one in self.neurons]
        lines = [f"{kind}: {neurons}" for kind, neurons in zip(kinds, self.neurons, strict=True)]
        reads = "the stream itself" if self.pre is None else str(self.pre)
        writes = " then ".join(map(str, self.post)) or "no norm"
        return "\n".join([*lines, f"reads: {reads}", f"writes through: {writes}"])


def _as_experts(shared: dict[str, tuple[Tensor, ...]], d_mlp: int) -> dict[str, tuple[Tensor, ...]]:
    """A shared expert that is n times as wide as a routed one, as n of these."""
    if len(shared["W_in"][0]) % d_mlp:
        return shared
    return {
        name: tuple(piece for matrix in matrices for piece in matrix.split(d_mlp)) for name, matrices in shared.items()
    }


@dataclass(frozen=True)
class Layout:
    """Where models of one class and config keep what a decode reads."""

    class_name: str
    root: str
    """What comes before the number of a layer, such as "model.layers."."""
    layers: tuple[LayerLayout, ...]
    final: Norm | None
    """The norm before the unembedding, by its whole name; None without one."""
    unembedding: Place
    """By its whole name."""
    shared_with: tuple[str, ...]
    """Other names of the same tensor: the embedding's, where the two are tied."""
    d_model: int
    """Of the model that was traced."""
    scale: float
    """What the model multiplies its logits by, ..."""
    scale_power: float = 0.0
    """... times d_model to this power (T5: -1/2, where tied)."""
    n_streams: int = 1
    """Residual streams that the layers keep side by side, of which the final norm reads a sum (hyper-connections)."""

    def prefix(self, layer: int) -> str:
        """What a layer's names begin with."""
        return f"{self.root}{layer}."

    @property
    def readable(self) -> list[int]:
        """Layers whose neurons can be read."""
        return [at for at, layer in enumerate(self.layers) if layer.neurons]

    @property
    def centre(self) -> bool:
        """Whether the final norm takes the mean off."""
        return self.final is not None and self.final.centre

    def multiplier(self, d_model: int) -> float:
        """What a model so wide multiplies its logits by."""
        return self.scale * d_model**self.scale_power

    def final_gain(self, tensors: Mapping[str, Tensor], d_model: int) -> Tensor | None:
        """What multiplies each coordinate before the unembedding, float32 [d_model]; None where nothing does."""
        gain = None if self.final is None else self.final.gain(tensors)
        scale = self.multiplier(d_model)
        if scale != 1:
            gain = torch.full((d_model,), scale) if gain is None else gain * scale
        return None if gain is None else require_finite(gain, "the final norm's scale")

    def __str__(self) -> str:
        lines = [f"{self.class_name}: {len(self.layers)} layers at {self.root}"]
        start = 0
        for stop in range(1, len(self.layers) + 1):
            if stop == len(self.layers) or self.layers[stop] != self.layers[start]:
                which = f"layer {start}" if stop == start + 1 else f"layers {start}-{stop - 1}"
                lines += [which, *("  " + line for line in str(self.layers[start]).splitlines())]
                start = stop
        names = ", ".join((self.unembedding.tensor, *self.shared_with))
        plain = self.scale == 1 and self.scale_power == 0
        scale = "" if plain else f", times {self.scale:g}" + f" d_model^{self.scale_power:g}" * (self.scale_power != 0)
        streams = "" if self.n_streams == 1 else f", of a sum of {self.n_streams} streams"
        return "\n".join([*lines, f"final norm: {self.final or 'none'}{streams}", f"unembedding: {names}{scale}"])
