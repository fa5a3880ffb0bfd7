"""The MLP weights of a model, whatever holds it: one layer at a time, as directions in the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.vocab import Vocab
from tl_flash.weights.probes import require_readable

SIDES = ("in", "gate", "out")
ALL = slice(None)
_MATRIX = {"in": "W_in", "gate": "W_gate", "out": "W_out"}
Matrix = Tensor | tuple[Tensor, ...]
"""[d_mlp, d_model], a neuron a row; in a mixture of experts a tuple of them, one an expert, the shared ones last.

A wide shared one counts as several of the routed experts' width.
"""


@dataclass(frozen=True)
class Layer:
    """One layer's MLP as the model holds it; views, never copies."""

    W_in: Matrix
    W_out: Matrix
    W_gate: Matrix | None = None
    gain_pre: Float[Tensor, " d_model"] | None = None
    """Scale of the norm before the MLP, None where there is none or it is folded in already."""
    gain_post: Float[Tensor, " d_model"] | None = None
    """Scale of the norms that what the MLP writes still passes (Gemma 2 and 3, OLMo 2), multiplied together."""
    gain_neurons: Float[Tensor, " d_mlp"] | None = None
    """Scale of a norm over the neurons, between their activation and W_out (SoLU, BitNet)."""
    centre_pre: bool | None = None
    """Whether the norm before takes the mean off; None: as the final norm does."""
    centre_post: bool | None = None
    """The same of the norms after."""
    centre_neurons: bool = True
    """The same of the norm over the neurons."""

    @property
    def n_experts(self) -> int | None:
        """How many experts; None where the MLP is dense."""
        return len(self.W_in) if isinstance(self.W_in, tuple) else None

    @property
    def widths(self) -> list[int]:
        """Neurons of the MLP, or of each expert in turn."""
        return [len(matrix) for matrix in (self.W_in if isinstance(self.W_in, tuple) else (self.W_in,))]

    @property
    def d_mlp(self) -> int:
        """Neurons of the MLP, or of each expert; of the first, where a shared one is no multiple of it."""
        return self.widths[0]

    @property
    def n_neurons(self) -> int:
        """Neurons of all experts, those of the first one first."""
        return sum(self.widths)


@dataclass(frozen=True, kw_only=True)
class UnembeddingWeights:
    """What reading any direction needs of a model.

    `W_U` is as the model holds it: the scores of a direction x are ``(final_gain * x) @ W_U``, equal to ``x @ W_U'``
    for the folded unembedding (LayerNorm's centring of W_U' over d_model changes nothing for a centred x).
    """

    d_model: int
    W_U: Float[Tensor, "d_model d_vocab"]
    final_gain: Float[Tensor, " d_model"] | None
    centre: bool
    """Whether the norm before the unembedding is a LayerNorm, which centres, and no RMSNorm."""
    final_norm: bool = True
    """Whether a norm comes before the unembedding; without one it reads a direction at its own length, tau = 1."""
    vocab: Vocab = field(repr=False)
    name: str
    class_name: str


@dataclass(frozen=True, kw_only=True)
class MLPWeights(UnembeddingWeights):
    """What the decode needs of a model. The directions and `final_gain` carry all folding."""

    n_layers: int
    d_mlp: int
    """Neurons of the MLP of the first layer that has one, or of each of its experts."""
    read_layer: Callable[[int], Layer] = field(repr=False)
    sides: tuple[str, ...]
    """Those of the first layer that has an MLP."""
    on_disk: bool = False
    """Whether a layer has to be read from a disk first."""
    require_layers: Callable[[Sequence[int]], None] = field(default=lambda layers: None, repr=False)
    """Fetches these layers where they are elsewhere, and refuses what is missing or misshapen."""
    identity: Callable[[], dict[str, Any]] | None = field(default=None, repr=False)
    """What tells a checkpoint from another, or from itself when it has changed; it is not read whole for that."""
    stored: str | None = None
    """The checkpoint's format and quantisation, where its numbers are packed."""

    @property
    def d_vocab(self) -> int:
        """Number of columns of W_U."""
        return self.W_U.shape[1]

    @property
    def dtype(self) -> str:
        """In which the model holds its unembedding, such as "bfloat16"."""
        return str(self.W_U.dtype).removeprefix("torch.")

    def layer(self, layer: int) -> Layer:
        """One layer's matrices.

        Raises:
            ValueError: the layer is unknown, or of another width than the residual stream.
        """
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layers: expected layers from 0 to {self.n_layers - 1}, got {layer}")
        read = self.read_layer(layer)
        for matrix in read.W_in if isinstance(read.W_in, tuple) else (read.W_in,):
            if matrix.shape[1:] != (self.d_model,):
                raise ValueError(
                    f"layer {layer}: W_in is {tuple(matrix.shape)}, expected ({read.d_mlp}, {self.d_model}): "
                    "d_mlp and d_model"
                )
        return read

    def held(
        self, layer: int, side: str, neurons: slice = ALL, device: torch.device | None = None
    ) -> Float[Tensor, "n d_model"]:
        """A layer's neurons on one side as the model holds them, in its dtype; by default all, where they are."""
        require_side(side, self.sides)
        return _some(self.layer(layer), layer, side, neurons, device)

    def directions(
        self,
        layer: int,
        side: str,
        *,
        fold_ln: bool = True,
        neurons: slice = ALL,
        device: torch.device | None = None,
    ) -> Float[Tensor, "n d_model"]:
        """The directions of one layer's neurons on one side, in the basis of the residual stream.

        Folded, the read sides carry the gain of the norm before the MLP and the write side that of a norm after it,
        and LayerNorm centres; so a model gives the same directions however it was loaded. A norm over the neurons is
        folded into the write side, a LayerNorm as TransformerLens does. Unfolded, the weights are read as the model
        holds them. They are float32, of a float64 model float64.

        Args:
            layer: which layer.
            side: "in", "gate" or "out".
            fold_ln: fold the norms' scales in.
            neurons: which of the layer's, one after the other; expert after expert where there are experts.
            device: where to; by default where the layer is.

        Raises:
            TypeError: neurons that are no slice.
            ValueError: an unknown layer or side, a slice with a step, no gate in this model, or a NaN or infinite
                weight.
        """
        require_side(side, self.sides)
        read = self.layer(layer)
        held = _some(read, layer, side, neurons, device)
        wide = torch.promote_types(held.dtype, torch.float32)
        x = require_finite(held.to(wide), f"layer {layer}: {_MATRIX[side]}", first=neurons.start or 0)
        if not fold_ln:
            return x
        after = side == "out"
        if after and read.gain_neurons is not None and not isinstance(read.W_out, tuple):
            of_neurons = require_finite(read.gain_neurons.detach().to(wide), f"layer {layer}: mlp.ln's scale")
            x = x * of_neurons[neurons, None].to(x.device)
            if read.centre_neurons:
                common = of_neurons @ read.W_out.detach().to(wide) / read.d_mlp  # what centring the neurons takes off
                x = x - common.to(x.device)
        gain, own = (read.gain_post, read.centre_post) if after else (read.gain_pre, read.centre_pre)
        centre = self.centre if own is None else own
        if after and centre and gain is not None:
            x = x - x.mean(-1, keepdim=True)  # which the norm does before it scales
        if gain is not None:
            x = x * require_finite(gain.detach().to(wide), f"layer {layer}: the norm's scale").to(x.device)
        return x - x.mean(-1, keepdim=True) if self.centre or (centre and not after) else x


def _some(
    read: Layer, layer: int, side: str, neurons: slice, device: torch.device | None
) -> Float[Tensor, "n d_model"]:
    """Some of a layer's neurons, experts' one after the other."""
    matrix: Matrix | None = getattr(read, _MATRIX[side])
    if matrix is None:
        raise ValueError(f'layer {layer}: side "gate" needs a gated MLP, and this layer\'s has none; use "in" or "out"')
    require_readable(matrix[0] if isinstance(matrix, tuple) else matrix, f"layer {layer}")
    neurons = _run(neurons, len(matrix) if isinstance(matrix, Tensor) else sum(map(len, matrix)))
    if not isinstance(matrix, tuple):
        return matrix[neurons].detach().to(device)
    firsts = [0, *accumulate(map(len, matrix))]
    start, stop = neurons.start, neurons.stop
    pieces = [
        expert[max(start - first, 0) : stop - first].detach().to(device)
        for expert, first in zip(matrix, firsts, strict=False)
        if first < stop and start < first + len(expert)
    ]
    return torch.cat(pieces or [matrix[0][:0].detach().to(device)])


def _run(neurons: slice, n: int) -> slice:
    """A slice of n neurons as it counts from 0."""
    if not isinstance(neurons, slice):
        raise TypeError(f"neurons: expected a slice, got {neurons!r}; of one neuron i, give slice(i, i + 1)")
    start, stop, step = neurons.indices(n)
    if step != 1:
        raise ValueError(f"neurons: expected a slice without a step, got {neurons}; take every n-th of what that gives")
    return slice(start, max(start, stop))


def require_side(side: str, sides: Sequence[str]) -> None:
    """Refuse a side that does not exist, or that this model lacks."""
    if side not in SIDES:
        raise ValueError(f'side: expected "in", "gate" or "out", got {side!r}')
    if side not in sides:
        raise ValueError('side: "gate" needs a gated MLP, and this model\'s MLP has none; use "in" or "out"')


def require_finite(tensor: Tensor, what: str, first: int = 0) -> Tensor:
    """Return a tensor that holds no NaN and no infinity; `first` is what its first row is called.

    Raises:
        ValueError: it holds one; the message says how many and where the first is.
    """
    if torch.isfinite(tensor.detach().sum()):  # one reading, and of finite weights finite but where it overflows
        return tensor
    finite = torch.isfinite(tensor)
    if not finite.all():
        row, *column = (int(i) for i in (~finite).nonzero()[0])
        place, count = (row + first, *column), int((~finite).sum())
        raise ValueError(
            f"{what} holds {count} NaN or infinite values, the first at {place} (neuron or row first); "
            "expected finite weights: check how the model was loaded or trained"
        )
    return tensor


def chosen_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    """The layers asked for, all by default.

    Raises:
        TypeError: not whole numbers.
        ValueError: none, unknown ones, or one twice.
    """
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Iterable)):
        raise TypeError(f"layers: expected a list of whole numbers, got {layers!r}")
    chosen = list(range(n_layers)) if layers is None else list(layers)
    if not chosen:
        raise ValueError("layers: expected at least one layer, got an empty list; leave it out to decode all")
    for layer in chosen:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"layers: expected whole numbers, got {layer!r}")
        if not 0 <= layer < n_layers:
            raise ValueError(f"layers: expected layers from 0 to {n_layers - 1}, got {layer}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers: expected each layer once, got {chosen}")
    return [int(layer) for layer in chosen]
