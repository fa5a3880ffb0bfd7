"""Find the neurons of experts that one module holds stacked, by what it answers when one neuron alone is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from tl_flash.weights.calls import Call, Unreadable, doubled, rows
from tl_flash.weights.dense import Seen
from tl_flash.weights.layouts import Neurons
from tl_flash.weights.places import Place

_NEURON = 3
_COLUMN = 5


def routed_neurons(inside: Sequence[Call], path: str) -> list[Seen]:
    """The experts in a layer whose matrices are stacks [expert, ., .] of one module.

    Raises:
        Unreadable: gate and up cannot be told apart.
    """
    found = [(call, neurons) for call in inside if (neurons := _experts_of(call, path)) is not None]
    return [Seen(call.path, call.x, call.y, call.order, neurons) for call, neurons in found]


def _experts_of(call: Call, path: str) -> Neurons | None:
    stacks = {name: p.detach() for name, p in call.module.named_parameters(recurse=False) if p.ndim == 3}
    ends = [(name, axis) for name in stacks if len(stacks) > 1 and (axis := _written_axis(call, stacks, name))]
    if not ends:
        return None
    down, transposed = ends[0][0], ends[0][1] == 1
    d_mlp = stacks[down].shape[2 if transposed else 1]
    alone = stacks | {down: _only_neuron(stacks[down], axis=2 if transposed else 1)}
    found = _rows_of_neuron(call, alone, down, d_mlp)
    if not found or len(found) > 2:
        return None
    bends = [_bends(call, alone, place, d_mlp) for place in found] if len(found) == 2 else [False]
    if sorted(bends)[0] or sum(bends) != len(found) - 1:
        raise Unreadable(f"{call.path}: which of its two matrices is the gate cannot be told")
    prefix = f"{call.path}.".removeprefix(path + ".")
    up, *gates = [
        replace(place, tensor=prefix + place.tensor) for _, place in sorted(zip(bends, found, strict=True), key=_bent)
    ]
    return Neurons(up, gates[0] if gates else None, Place(prefix + down, transposed), routed=True)


def _bent(pair: tuple[bool, Place]) -> bool:
    return pair[0]


def _answer(call: Call, stacks: dict[str, Tensor]) -> Tensor:
    """What the module answers to the same tensors with other weights."""
    args, kwargs = call.given
    with doubled():
        answer = functional_call(call.module, stacks, args, kwargs)
    return rows(answer if torch.is_tensor(answer) else answer[0])


def _gradients(call: Call, stacks: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    """Of one coordinate of the answer, with respect to stacks."""
    with torch.enable_grad():
        leaves = {name: stack.clone().requires_grad_() for name, stack in stacks.items()}
        entry = _answer(call, leaves)[:, _COLUMN].square().sum()
        return [*torch.autograd.grad(entry, [leaves[name] for name in names], materialize_grads=True)]


def _written_axis(call: Call, stacks: dict[str, Tensor], name: str) -> int | None:
    """The axis of a stack along which one coordinate of the answer depends on one coordinate alone; None where none."""
    (gradient,) = _gradients(call, stacks, [name])
    for axis in (1, 2):
        by_coordinate = gradient.movedim(axis, 0).flatten(1).abs().sum(1)
        if len(by_coordinate) == call.y.shape[-1] and by_coordinate.nonzero().flatten().tolist() == [_COLUMN]:
            return axis
    return None


def _only_neuron(down: Tensor, axis: int) -> Tensor:
    """The same stack with all neurons cut off but one of each expert."""
    alone = torch.zeros_like(down)
    alone.select(axis, _NEURON).copy_(down.select(axis, _NEURON))
    return alone


def _rows_of_neuron(call: Call, stacks: dict[str, Tensor], down: str, d_mlp: int) -> list[Place]:
    d_model = call.y.shape[-1]
    names = [name for name, stack in stacks.items() if name != down and d_model in stack.shape[1:]]
    found: list[Place] = []
    for name, gradient in zip(names, _gradients(call, stacks, names), strict=True):
        found += _places(name, gradient, d_mlp, d_model, False) or _places(name, gradient, d_mlp, d_model, True)
    return found


def _places(name: str, gradient: Tensor, d_mlp: int, d_model: int, transposed: bool) -> list[Place]:
    """Where in a stack the vectors of the neuron that is left lie, if they lie along this axis."""
    by_row = (gradient.mT if transposed else gradient).abs()
    touched = set(by_row.sum((0, 2)).nonzero().flatten().tolist())
    parts = by_row.shape[1] // d_mlp if by_row.shape[2] == d_model else 0
    for interleaved in (False, True)[:parts]:
        if touched and touched <= {_row(part, parts, interleaved, d_mlp) for part in range(parts)}:
            return [Place(name, transposed, part, parts, interleaved) for part in range(parts)]
    return []


def _row(part: int, parts: int, interleaved: bool, d_mlp: int) -> int:
    return _NEURON * parts + part if interleaved else _NEURON + part * d_mlp


@torch.no_grad()
def _bends(call: Call, stacks: dict[str, Tensor], place: Place, d_mlp: int) -> bool:
    """Whether the neuron's answer is bent in this vector of it: it is not in the up, whatever the activation."""
    axis, answers = 2 if place.transposed else 1, []
    for factor in (-1.0, 0.0, 1.0):
        scaled = stacks[place.tensor].clone()
        scaled.select(axis, _row(place.part, place.parts, place.interleaved, d_mlp)).mul_(factor)
        answers.append(_answer(call, stacks | {place.tensor: scaled}))
    bend = (answers[0] + answers[2] - 2 * answers[1]).abs().max()
    return bool(bend > 1e-6 * (answers[2] - answers[0]).abs().max())
