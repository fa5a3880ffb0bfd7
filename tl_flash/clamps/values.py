"""What a clamp does to activations, and the values that it may be given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tl_flash.names import AnyNeuron, Neuron, NeuronKey, neuron_of

Mode = Literal["set", "add", "multiply", "floor", "ceil"]
APPLY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "set": lambda act, value: value.expand_as(act),
    "add": torch.add,
    "multiply": torch.mul,
    "floor": torch.maximum,
    "ceil": torch.minimum,
}


def require_mode(mode: str) -> None:
    """Refuse a mode that does not exist."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")


def named_values(neurons: Mapping[NeuronKey, float | Tensor]) -> dict[Neuron, float | Tensor]:
    """The neurons and values of a clamp of dense MLPs, checked.

    Raises:
        ValueError: as in `all_named_values`, or a neuron of an expert.
        TypeError: as in `all_named_values`.
    """
    return {Neuron.of(neuron): value for neuron, value in all_named_values(neurons).items()}


def all_named_values(neurons: Mapping[NeuronKey, float | Tensor]) -> dict[AnyNeuron, float | Tensor]:
    """A clamp's neurons and values, checked; the neurons may be those of experts.

    Raises:
        TypeError: no dict, or a value that is no real number.
        ValueError: no neuron, one named twice, or a value that is not finite.
    """
    if not isinstance(neurons, Mapping):
        raise TypeError(f"neurons: expected a dict of neuron to value, got {type(neurons).__name__}")
    if not neurons:
        raise ValueError("neurons: expected at least one neuron, got an empty dict, which would clamp nothing")
    values: dict[AnyNeuron, float | Tensor] = {}
    for name, value in neurons.items():
        neuron = neuron_of(name)
        if neuron in values:
            raise ValueError(f"neurons: {neuron} is named twice; give it one value")
        values[neuron] = checked_value(neuron, value)
    return values


def checked_value(neuron: AnyNeuron, value: Any) -> float | Tensor:
    """A value that a neuron can be clamped by; see `named_values`."""
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"value of {neuron}: expected real numbers, got a tensor of {value.dtype}")
        finite = bool(torch.isfinite(value).all()) and value.numel() > 0
    elif isinstance(value, Real) and not isinstance(value, bool):
        value = float(value)
        finite = abs(value) < float("inf")
    else:
        raise TypeError(f"value of {neuron}: expected a number or a tensor, got {type(value).__name__}")
    if not finite:
        raise ValueError(f"value of {neuron}: expected finite numbers, got {value}")
    return value


def require_finite(values: Tensor, act: Tensor) -> None:
    """Refuse values that the model's dtype cannot hold."""
    if not torch.isfinite(values).all():
        raise ValueError(f"neurons: some values are not finite in the model's {act.dtype}; give smaller ones")


def fits(shape: torch.Size, into: torch.Size) -> bool:
    """Whether values of one shape broadcast to another."""
    pairs = zip(reversed(shape), reversed(into), strict=False)
    return len(shape) <= len(into) and all(size in (1, whole) for size, whole in pairs)
