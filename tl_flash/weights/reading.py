"""A layout and a holder of tensors to MLPWeights: the same reading of a model in memory and of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tl_flash.weights.layouts import Layout
from tl_flash.weights.mlp import Layer, MLPWeights, UnembeddingWeights


def unembedding_of(layout: Layout, tensors: Mapping[str, Tensor], *, W_U: Tensor, **about: Any) -> UnembeddingWeights:
    """The unembedding that a layout names and the norm before it, whatever its layers are.

    Args:
        layout: where they are.
        tensors: hold the norm.
        W_U: the unembedding [d_model, d_vocab].
        about: what else `UnembeddingWeights` is to say.
    """
    return UnembeddingWeights(**_output(layout, tensors, W_U), **about)


def weights_of(layout: Layout, tensors: Callable[[], Mapping[str, Tensor]], *, W_U: Tensor, **about: Any) -> MLPWeights:
    """The weights that a layout names.

    Args:
        layout: where they are.
        tensors: opens what holds them; asked once a layer.
        W_U: the unembedding [d_model, d_vocab].
        about: what else `MLPWeights` is to say.

    Raises:
        ValueError: no layer can be read.
    """
    first = first_readable(layout)

    def read_layer(layer: int) -> Layer:
        require_readable_layers(layout, [layer])
        return layout.layers[layer].read(tensors(), layout.prefix(layer))

    read = read_layer(first)
    return MLPWeights(
        n_layers=len(layout.layers),
        d_mlp=read.d_mlp,
        read_layer=read_layer,
        sides=("in", "out") if read.W_gate is None else ("in", "gate", "out"),
        **_output(layout, tensors(), W_U),
        **about,
    )


def _output(layout: Layout, tensors: Mapping[str, Tensor], W_U: Tensor) -> dict[str, Any]:
    """What `UnembeddingWeights` says of the last norm and the unembedding."""
    return {
        "d_model": W_U.shape[0],
        "W_U": W_U,
        "final_gain": layout.final_gain(tensors, W_U.shape[0]),
        "centre": layout.centre,
        "final_norm": layout.final is not None,
    }


def first_readable(layout: Layout) -> int:
    """The first layer whose neurons can be read.

    Raises:
        ValueError: none can.
    """
    if layout.readable:
        return layout.readable[0]
    faults = "; ".join(
        sorted({layer.fault or "no MLP that reads and writes the residual stream" for layer in layout.layers})
    )
    raise ValueError(f"{layout.class_name}: no layer's neurons can be read: {faults}")


def require_readable_layers(layout: Layout, layers: Sequence[int]) -> None:
    """Refuse layers whose neurons cannot be read.

    Raises:
        ValueError: one cannot; the message says which can.
    """
    for layer in layers:
        if layer not in layout.readable:
            why = layout.layers[layer].fault or "it has no MLP that reads and writes the residual stream"
            raise ValueError(
                f"layer {layer}: its neurons cannot be read ({why}); give layers={layout.readable}, which can"
            )
