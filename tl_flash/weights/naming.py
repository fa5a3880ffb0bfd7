"""The names under which a model is saved, which are often not those of its parameters: found by the numbers saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_flash.weights.layouts import LayerLayout, Layout, Neurons
from tl_flash.weights.places import Norm, Place


def saved_layout(layout: Layout, model: Any) -> Layout:
    """The same layout by the names that `save_pretrained` gives, which published checkpoints have too.

    Args:
        layout: by the names of the model's parameters.
        model: a tiny model whose every tensor is random, so that each is known again by its numbers.

    Raises:
        ValueError: some tensor is saved in a form that is not understood.
    """
    held = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}
    saved = _Saved(_as_saved(model))
    names = _Names(held, saved)
    root = layout.root
    if layout.readable:
        first = layout.readable[0]
        down = layout.layers[first].neurons[-1].down
        root = _root(names.whole(layout.prefix(first) + down.tensor, down), first)
    aliases = (layout.unembedding.tensor, *layout.shared_with)
    unembeddings = dict.fromkeys([*saved.names(held[layout.unembedding.tensor]), *aliases])
    return replace(
        layout,
        root=root,
        layers=tuple(names.layer(one, layout.prefix(at), f"{root}{at}.") for at, one in enumerate(layout.layers)),
        final=layout.final and names.norm(layout.final, "", ""),
        unembedding=replace(layout.unembedding, tensor=next(iter(unembeddings))),
        shared_with=tuple(unembeddings)[1:],
    )


def _as_saved(model: Any) -> Mapping[str, Tensor]:
    """The tensors that `save_pretrained` would write; transformers 4 writes a model's own."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return model.state_dict()
    return revert_weight_conversion(model, model.state_dict())


def _root(name: str, layer: int) -> str:
    before, number, _ = f".{name}".partition(f".{layer}.")
    if not number:
        raise ValueError(f"{name}: expected the number of its layer, {layer}, in a saved tensor's name")
    return f"{before}.".removeprefix(".")


class _Saved:
    """Saved tensors by their numbers."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._by_sum: dict[tuple[int, float], list[str]] = {}
        self._tensors = tensors
        for name, tensor in tensors.items():
            self._by_sum.setdefault(self._key(tensor), []).append(name)

    @staticmethod
    def _key(tensor: Tensor) -> tuple[int, float]:
        return tensor.numel(), float(tensor.double().flatten().sort().values.sum())

    def find(self, tensor: Tensor) -> str | None:
        """The name under which a tensor is saved as it is."""
        return next(iter(self.names(tensor)), None)

    def names(self, tensor: Tensor) -> list[str]:
        """All names under which it is saved."""
        return [name for name in self._alike(tensor) if torch.equal(self._tensors[name], tensor)]

    def find_either_way(self, rows: Tensor) -> tuple[str, bool] | None:
        """The name under which a matrix is saved, and whether it is transposed."""
        for transposed in (False, True):
            name = self.find(rows.mT if transposed else rows)
            if name is not None:
                return name, transposed
        return None

    def _alike(self, tensor: Tensor) -> list[str]:
        return self._by_sum.get(self._key(tensor), [])


class _Names:
    """From the names of a model's parameters to those of what was saved of it."""

    def __init__(self, held: Mapping[str, Tensor], saved: _Saved) -> None:
        self._held, self._saved = held, saved

    def layer(self, layer: LayerLayout, prefix: str, new: str) -> LayerLayout:
        return replace(
            layer,
            neurons=tuple(self._neurons(neurons, prefix, new) for neurons in layer.neurons),
            pre=layer.pre and self.norm(layer.pre, prefix, new),
            post=tuple(self.norm(norm, prefix, new) for norm in layer.post),
        )

    def norm(self, norm: Norm, prefix: str, new: str) -> Norm:
        if norm.weight is None:
            return norm
        name = self._saved.find(self._held[prefix + norm.weight])
        return replace(norm, weight=_within(name, new, norm.weight))

    def whole(self, name: str, place: Place) -> str:
        """Under which name a tensor is saved, or its first part."""
        tensor = self._held[name.format(0)]
        rows = place.rows(tensor)
        found = self._saved.find(tensor) or self._saved.find_either_way(rows if rows.ndim == 2 else rows[0])
        if found is None:
            raise ValueError(f"{name} is saved in a form that is not understood")
        return found if isinstance(found, str) else found[0]

    def _neurons(self, neurons: Neurons, prefix: str, new: str) -> Neurons:
        gate = neurons.gate and self._place(neurons.gate, prefix, new, neurons)
        up, down = (self._place(place, prefix, new, neurons) for place in (neurons.up, neurons.down))
        norm = neurons.norm and self.norm(neurons.norm, prefix, new)
        return replace(neurons, up=up, gate=gate, down=down, norm=norm)

    def _place(self, place: Place, prefix: str, new: str, neurons: Neurons) -> Place:
        if "{}" in place.tensor:
            first, second = (
                self._place(replace(place, tensor=place.tensor.format(n)), prefix, new, neurons) for n in (0, 1)
            )
            return replace(first, tensor=_numbered(first.tensor, second.tensor))
        tensor = self._held[prefix + place.tensor]
        name = self._saved.find(tensor)
        if name is not None:
            return replace(place, tensor=_within(name, new, place.tensor))
        if tensor.ndim == 3 and (each := self._of_each(tensor, place, new)) is not None:
            return each
        rows = place.rows(tensor)
        alone = self._saved.find_either_way(rows)
        if alone is not None:
            return Place(_within(alone[0], new, place.tensor), alone[1])
        raise ValueError(f"{prefix}{place.tensor} is saved in a form that is not understood")

    def _of_each(self, stack: Tensor, place: Place, new: str) -> Place | None:
        """Where each expert has a tensor of its own: for all its vectors, or for what shares a stack."""
        rows = [place.rows(one) for one in stack[:2]]
        whole = [self._saved.find_either_way(one) for one in stack[:2]]
        own = [self._saved.find_either_way(one) for one in rows]
        found = own if None not in own else whole
        if None in found:
            return None
        (first, transposed), (second, _) = found  # pyright: ignore[reportGeneralTypeIssues] - not None
        pattern = _numbered(_within(first, new, place.tensor), _within(second, new, place.tensor))
        if found is own:
            return Place(pattern, transposed)
        return replace(place, tensor=pattern, transposed=transposed != place.transposed)


def _numbered(first: str, second: str) -> str:
    """The name of what an expert has, "{}" for its number, by those of the first two."""
    parts = first.split("0")
    patterns = ["0".join(parts[:at]) + "{}" + "0".join(parts[at:]) for at in range(1, len(parts))]
    found = next((pattern for pattern in patterns if pattern.format(1) == second), None)
    if found is None:
        raise ValueError(f"{first} and {second}: expected names of experts that differ by their number alone")
    return found


def _within(name: str | None, prefix: str, held: str) -> str:
    if name is None or not name.startswith(prefix):
        raise ValueError(f"{held} is saved as {name}; expected a name that begins with {prefix}")
    return name.removeprefix(prefix)
