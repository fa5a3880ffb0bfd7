"""Find neurons between linear maps: where one reads, number for number, a function of what others answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tl_flash.weights.calls import Call, Unreadable, of_linear, rows, same
from tl_flash.weights.layouts import Neurons
from tl_flash.weights.places import Place
from tl_flash.weights.seen_norms import SeenNorm, as_norm


@dataclass(frozen=True, eq=False)
class Seen:
    """An MLP that was seen: what it reads, what it writes, its matrices."""

    path: str
    x: Tensor
    y: Tensor
    order: int
    """Of the first call that reads."""
    neurons: Neurons


def dense_neurons(inside: Sequence[Call], path: str, layer: Call) -> list[Seen]:
    """The MLPs made of linear maps in a layer; experts are such where they are a list, or each map a stack (JetMoE).

    Args:
        inside: the calls within the layer.
        path: of the layer.
        layer: its own call.

    Raises:
        Unreadable: there are neurons, but not as vectors.
    """
    linears, ran = [call for call in inside if call.is_linear], {call.path.removeprefix(path + ".") for call in inside}
    found = [one for down in linears if (one := _neurons_into(down, linears, inside, path, layer)) is not None]
    return [replace(one, neurons=_of_list(one.neurons, layer.module, ran)) for one in found]


def _of_list(neurons: Neurons, layer: nn.Module, ran: set[str]) -> Neurons:
    """Those of every expert, where an MLP is one of a list of experts that are alike; some of them may not have run."""
    names = [place.tensor for place in neurons.places.values()]
    for path, modules in _lists(layer):
        inside = next((f"{path}.{key}" for key in modules if names[0].startswith(f"{path}.{key}.")), None)
        if inside is None or not all(name.startswith(f"{inside}.") for name in names):
            continue
        if len({str(module) + str(_shapes(module)) for module in modules.values()}) == 1 < len(modules):
            pattern = f"{path}.{[*modules][0].replace('0', '{}')}"
            if [*modules] != [pattern.format(n).removeprefix(f"{path}.") for n in range(len(modules))]:
                raise Unreadable(f"the experts of {path} are called {', '.join(modules)} and not by their numbers")
            places = [
                place and replace(place, tensor=pattern + place.tensor.removeprefix(inside))
                for place in (neurons.up, neurons.gate, neurons.down)
            ]
            if neurons.norm is not None:
                raise Unreadable(f"the experts of {path} have norms of their own")
            return Neurons(places[0], places[1], places[2], routed=True)  # pyright: ignore[reportArgumentType]
        idle = [key for key in modules if not any(f"{one}.".startswith(f"{path}.{key}.") for one in ran)]
        if idle:
            raise Unreadable(f"{path} holds modules that differ, of which {', '.join(idle)} did not run")
    return neurons


def _lists(layer: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    for path, module in layer.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield path, {key: child for key, child in module.named_children() if [*child.parameters()]}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _norm_before(down: Call, inside: Sequence[Call]) -> SeenNorm | None:
    before = [call for call in inside if call.order < down.order and call is not down and same(call.y, down.x)]
    return next((norm for call in reversed(before) if (norm := as_norm(call)) is not None), None)


def _neurons_into(down: Call, linears: Sequence[Call], inside: Sequence[Call], path: str, layer: Call) -> Seen | None:
    """The MLP that a linear map ends; None where what it reads are no neurons."""
    norm = _norm_before(down, inside)
    post = rows(down.x if norm is None else norm.call.x)
    n, k = post.shape
    ups = [
        call
        for call in linears
        if call.order < down.order and call.x.shape[-1] == down.y.shape[-1] and call.y.shape[-1] in (k, 2 * k)
    ]
    ups = [call for call in ups if len(rows(call.y)) == n and call.y.requires_grad]
    sources = _sources(post, ups) if ups and post.requires_grad and k >= 8 else None
    if sources is None or not _of_these_alone(post, {id(source.call): source.call for source in sources}, layer):
        return None
    up, gate = _roles(post, sources)
    if gate is None and same(post, up.call.y):
        return None  # two linear maps in a row
    transposed = of_linear(down)
    if transposed is None:
        raise Unreadable(f"{down.path} is no linear map by its weight alone")
    return Seen(
        path=down.path,
        x=up.call.x,
        y=down.y,
        order=min(one.call.order for one in (up, gate) if one is not None),
        neurons=Neurons(
            up=up.place(path),
            gate=None if gate is None else gate.place(path),
            down=Place(f"{down.path}.weight".removeprefix(path + "."), transposed=not transposed),
            routed=down.weight.ndim == 3,
            norm=None if norm is None else norm.named(path),
        ),
    )


@dataclass(frozen=True, eq=False)
class _Source:
    """Where in a linear map's answer a neuron's pre-activation is."""

    call: Call
    part: int
    parts: int
    interleaved: bool

    def column(self, neuron: int, width: int) -> int:
        return neuron * self.parts + self.part if self.interleaved else neuron + self.part * width

    def place(self, path: str) -> Place:
        transposed = of_linear(self.call)
        if transposed is None:
            raise Unreadable(f"{self.call.path} is no linear map by its weight alone")
        name = f"{self.call.path}.weight".removeprefix(path + ".")
        return Place(name, transposed, self.part, self.parts, self.interleaved)


def _sources(post: Tensor, ups: Sequence[Call]) -> list[_Source] | None:
    """Of which numbers of which maps each neuron is a function, of one at its own position each; else None."""
    width, places = post.shape[-1], [up.y for up in ups]
    everything = torch.autograd.grad(post[-1].sum(), places, retain_graph=True, materialize_grads=True)
    if any(bool(rows(gradient)[:-1].any()) for gradient in everything):
        return None
    for neuron in range(2, width - 2):
        gradients = torch.autograd.grad(post[-1, neuron], places, retain_graph=True, allow_unused=True)
        found = []
        for up, gradient in zip(ups, gradients, strict=True):
            if gradient is None or not bool(gradient.any()):
                continue
            _, column = rows(gradient).nonzero(as_tuple=True)
            sources = _columns(up, column.tolist(), neuron, width)
            if sources is None:
                return None
            found += sources
        if found:
            return found if len(found) <= 2 else None
    return None


def _of_these_alone(post: Tensor, ups: dict[int, Call], layer: Call) -> bool:
    """Whether neurons depend on what the layer is given through these maps and by no other way."""
    args, kwargs = layer.given
    given = [one for one in (*args, *kwargs.values()) if torch.is_tensor(one) and one.requires_grad]
    answers, entry = [up.y for up in ups.values()], post[-1].sum()
    through = torch.autograd.grad(entry, answers, retain_graph=True)
    linear = sum((gradient.detach() * y).sum() for gradient, y in zip(through, answers, strict=True))
    whole = torch.autograd.grad(entry, given, retain_graph=True, materialize_grads=True)
    beside = torch.autograd.grad(entry - linear, given, retain_graph=True, materialize_grads=True)
    return all(bool(b.abs().max() <= 1e-9 * w.abs().max()) for b, w in zip(beside, whole, strict=True))


def _columns(up: Call, columns: list[int], neuron: int, width: int) -> list[_Source] | None:
    parts = up.y.shape[-1] // width
    kinds = [(part, interleaved) for interleaved in (False, True)[:parts] for part in range(parts)]
    sources = [_Source(up, part, parts, interleaved) for part, interleaved in kinds]
    found = [source for source in sources if source.column(neuron, width) in columns]
    alike = len({source.interleaved for source in found}) == 1
    return found if alike and len(found) == len(columns) else None


def _roles(post: Tensor, sources: Sequence[_Source]) -> tuple[_Source, _Source | None]:
    """Up and gate: the activation bends the gate and not the up."""
    if len(sources) == 1:
        return sources[0], None
    bends = [_bends(post, source) for source in sources]
    if bends == [False, False]:  # ReLU: what passes is positive
        bends = [_only_positive(post, source) for source in sources]
    if sorted(bends) != [False, True]:
        raise Unreadable("which of its two maps is the gate cannot be told")
    return sources[bends.index(False)], sources[bends.index(True)]


def _bends(post: Tensor, source: _Source) -> bool:
    width, y = post.shape[-1], source.call.y
    for neuron in range(2, 10):
        (first,) = torch.autograd.grad(post[-1, neuron], y, create_graph=True)
        slope = rows(first)[-1, source.column(neuron, width)]
        second = torch.autograd.grad(slope, y, retain_graph=True, allow_unused=True)[0] if slope.requires_grad else None
        if second is not None and abs(float(rows(second)[-1, source.column(neuron, width)])) > 1e-9:
            return True
    return False


def _only_positive(post: Tensor, source: _Source) -> bool:
    width = post.shape[-1]
    columns = [source.column(neuron, width) for neuron in range(width)]
    passed = rows(source.call.y)[:, columns][post != 0]
    return bool((passed > 0).all())
