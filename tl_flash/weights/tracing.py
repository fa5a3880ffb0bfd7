"""Find a model's layout by watching one forward pass of a few tokens: by which tensors are the same, and by gradients.

Nothing is known of any class. The unembedding is what answers the logits; the norm before it, what answers the
unembedding's input; the stack of layers, the list whose last item answers that norm's input. In a layer, neurons are
where a linear map answers into the stream what is, number for number, a function of what one or two linear maps answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_flash.weights.calls import Call, as_norm, carried, of_linear, passes, passes_beside, record, rows, run, same
from tl_flash.weights.calls import Norm as SeenNorm
from tl_flash.weights.experts import Experts, experts_of
from tl_flash.weights.layouts import LayerLayout, Layout, Neurons, Norm, Place


class Unreadable(ValueError):
    """Neurons that are there, but not as vectors in the residual stream."""


def trace(model: nn.Module, **inputs: Tensor) -> Layout:
    """The layout of a model, by a forward pass; its numbers must be random, so that no two tensors are alike.

    Raises:
        ValueError: what lies between the last layer and the logits is more than a norm and a linear map, or the layers
            are not run one after the other.
    """
    calls, answer = record(model, inputs)
    head = _head(calls, answer.logits)
    stacks = [*_stacks(model, calls)]
    final, factor, stack = _last(stacks, calls, head)
    transposed = of_linear(head)
    if transposed is None:
        raise Unreadable(f"{head.path} is no linear map by its weight alone")
    weight, own = head.module.weight, f"{head.path}.weight"
    return Layout(
        class_name=type(model).__name__,
        root=stack.path + ".",
        layers=tuple(_layer(stack.path, layer, calls) for layer in range(len(stack.calls))),
        final=None if final is None else _norm(final, "", final.call.path),
        unembedding=Place(own, transposed),
        shared_with=tuple(name for name, other in _named(model) if other is weight and name != own),
        d_model=head.x.shape[-1],
        scale=factor * _slope(model, inputs, head),
    )


def _named(model: nn.Module) -> Sequence[tuple[str, nn.Parameter]]:
    return [*model.named_parameters(remove_duplicate=False)]


# From the logits back to the last layer


def _head(calls: Sequence[Call], logits: Tensor) -> Call:
    found = [call for call in calls if call.is_linear and call.y.shape[-1] == logits.shape[-1]]
    if not found or found[-1].y.numel() != logits.numel():
        raise Unreadable("no linear map answers the logits")
    return found[-1]


def _slope(model: nn.Module, inputs: dict[str, Tensor], head: Call) -> float:
    """What the logits are multiplied by where they are small: a softcap leaves them as they are."""
    small = torch.zeros_like(head.y, requires_grad=True)
    handle = head.module.register_forward_hook(lambda module, args, output: small)
    try:
        logits = run(model, inputs).logits
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(logits.sum(), small)
    slope = float(gradient.mean())
    if not slope > 0 or float(gradient.std()) > 1e-6 * slope:
        raise Unreadable(f"the logits are more than a multiple of what {head.path} answers")
    return 1.0 if abs(slope - 1) < 1e-6 else slope


@dataclass(frozen=True)
class _Stack:
    path: str
    calls: list[list[Call]]
    """Of each layer."""


def _stacks(model: nn.Module, calls: Sequence[Call]) -> Iterator[_Stack]:
    by_path: dict[str, list[Call]] = {}
    for call in calls:
        by_path.setdefault(call.path, []).append(call)
    for path, module in model.named_modules():
        layers = [by_path.get(f"{path}.{layer}", []) for layer in range(len(module))] if _is_list(module) else []
        if layers and layers[-1]:
            yield _Stack(path, layers)


def _last(stacks: Sequence[_Stack], calls: Sequence[Call], head: Call) -> tuple[SeenNorm | None, float, _Stack]:
    """The norm before the unembedding, what its output is multiplied by, and the stack whose stream it reads."""
    for stack in stacks:
        if same(stack.calls[-1][-1].y, head.x):
            return None, 1.0, _in_order(stack)
    for call in reversed(calls[: head.order]):
        factors = carried(head.x, call.y) if call.y.shape == head.x.shape else None
        norm = None if factors is None else as_norm(call)
        stack = next((stack for stack in stacks if norm and same(stack.calls[-1][-1].y, call.x)), None)
        if factors is not None and norm is not None and stack is not None:
            if float(factors.std()) > 1e-6 * float(factors.mean()):
                raise Unreadable(f"{head.path} reads what {call.path} answers, each position scaled by another factor")
            return norm, float(factors.mean()), _in_order(stack)
    raise Unreadable("between the last layer and the unembedding is more than a norm")


def _in_order(stack: _Stack) -> _Stack:
    if any(len(layer) != 1 for layer in stack.calls):
        raise Unreadable(f"the layers of {stack.path} do not run once each")
    layers = [layer[0] for layer in stack.calls]
    if any(not same(after.x, before.y) for before, after in zip(layers, layers[1:], strict=False)):
        raise Unreadable(f"a layer of {stack.path} reads something else than the layer before it answers")
    return stack


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


# Within a layer


@dataclass(frozen=True, eq=False)
class _Seen:
    """An MLP that was seen: what it reads, what it writes, its matrices."""

    path: str
    x: Tensor
    y: Tensor
    order: int
    """Of the first call that reads."""
    neurons: Neurons


def _layer(stack: str, layer: int, calls: Sequence[Call]) -> LayerLayout:
    path = f"{stack}.{layer}"
    inside = [call for call in calls if call.path.startswith(path + ".")]
    out = next(call for call in calls if call.path == path)
    try:
        seen = [*_routed(inside, path), *_dense(inside, path, out)]
        if not seen:
            return LayerLayout()
        norms = [norm for call in inside if call.x.shape[-1] == out.y.shape[-1] and (norm := as_norm(call)) is not None]
        posts = [_posts(norms, one, out, inside) for one in seen]
        pres = [_pre(norms, one, out, inside, _written(seen, posts, out)) for one in seen]
        pre, post = _one_of(pres, "read"), _one_of([tuple(post) for post in posts], "pass")
    except Unreadable as fault:
        return LayerLayout(fault=str(fault))
    return LayerLayout(
        neurons=tuple(one.neurons for one in sorted(seen, key=lambda one: not one.neurons.routed)),
        pre=None if pre is None else _norm(pre, path + ".", pre.call.path),
        post=tuple(_norm(one, path + ".", one.call.path) for one in post),
    )


def _one_of(given: list[Any], verb: str) -> Any:
    if any(one is not given[0] and one != given[0] for one in given):
        raise Unreadable(f"its MLPs {verb} several norms")
    return given[0]


def _dense(inside: Sequence[Call], path: str, layer: Call) -> list[_Seen]:
    linears = [call for call in inside if call.is_linear]
    found = [one for down in linears if (one := _neurons_into(down, linears, path, layer)) is not None]
    return found


def _neurons_into(down: Call, linears: Sequence[Call], path: str, layer: Call) -> _Seen | None:
    """The MLP that a linear map ends; None where what it reads are no neurons."""
    post = rows(down.x)
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
    return _Seen(
        path=down.path,
        x=up.call.x,
        y=down.y,
        order=min(one.call.order for one in (up, gate) if one is not None),
        neurons=Neurons(
            up=up.matrix(path),
            gate=None if gate is None else gate.matrix(path),
            down=Place(f"{down.path}.weight".removeprefix(path + "."), transposed=not transposed),
            routed=down.module.weight.ndim == 3,
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

    def matrix(self, path: str) -> Place:
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
    return all(bool((b.abs().max() <= 1e-9 * w.abs().max())) for b, w in zip(beside, whole, strict=True))


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


def _routed(inside: Sequence[Call], path: str) -> list[_Seen]:
    found = []
    for call in inside:
        experts = experts_of(call)
        if experts is not None:
            found.append(_Seen(call.path, call.x, call.y, call.order, _of_experts(experts, call.path, path)))
    return found


def _of_experts(experts: Experts, path: str, layer: str) -> Neurons:
    prefix = f"{path}.".removeprefix(layer + ".")

    def matrix(found: Place) -> Place:
        return Place(prefix + found.tensor, found.transposed, found.part, found.parts, found.interleaved)

    if experts.gate is False:
        raise Unreadable(f"{path}: which of its two matrices is the gate cannot be told")
    return Neurons(
        up=matrix(experts.up),
        gate=None if experts.gate is None else matrix(experts.gate),
        down=matrix(experts.down),
        routed=True,
    )


# The norms around neurons


def _posts(norms: Sequence[SeenNorm], one: _Seen, out: Call, inside: Sequence[Call]) -> list[SeenNorm]:
    """The norms that what an MLP writes still passes on its way into the stream."""
    found: list[SeenNorm] = []
    written, order = one.y, one.order
    while not _arrives(written, order, out, inside):
        after = [norm for norm in norms if norm.call.order > order and norm not in found]
        norm = next((norm for norm in after if passes(norm.call.x, written)), None)
        if norm is None:
            raise Unreadable(
                f"what {one.path} answers is not added to the residual stream as it is, nor by norms alone"
            )
        found.append(norm)
        written, order = norm.call.y, norm.call.order
    return found


def _arrives(written: Tensor, order: int, out: Call, inside: Sequence[Call]) -> bool:
    """Whether it is in what the layer answers as it is: at once, or in a stream to which later parts of it add."""
    if passes(out.y, written):
        return True
    later = [call for call in inside if call.order > order and call.y.shape == out.y.shape]
    last = next((call for call in reversed(later) if call.y is not written and passes(out.y, call.y)), None)
    stream = next((call.x for call in inside if call.order > order and passes(call.x, written)), None)
    return last is not None and stream is not None and passes_beside(out.y, [last.y], stream)


def _written(seen: Sequence[_Seen], posts: Sequence[list[SeenNorm]], out: Call) -> list[tuple[Tensor, list[Tensor]]]:
    """Where what MLPs write is added, and what: into each norm after them, and into what the layer answers."""
    first = [(post[0].call.x, [one.y for one in seen]) for post in posts if post]
    last = [post[-1].call.y if post else one.y for one, post in zip(seen, posts, strict=True)]
    return [*first, (out.y, last)]


def _pre(
    norms: Sequence[SeenNorm],
    one: _Seen,
    out: Call,
    inside: Sequence[Call],
    written: Sequence[tuple[Tensor, list[Tensor]]],
) -> SeenNorm | None:
    """The norm of the stream that an MLP reads; None where it reads the stream itself."""

    def is_stream(read: Tensor) -> bool:
        return any(passes_beside(target, added, read) for target, added in written)

    before = [norm for norm in norms if norm.call.order < one.order and carried(one.x, norm.call.y) is not None]
    if before:
        return None if is_stream(before[-1].call.y) else before[-1]
    reads = [call.x for call in inside if call.x is one.x or same(call.x, one.x)]
    if carried(one.x, out.x) is not None or any(map(is_stream, reads)):
        return None
    raise Unreadable(f"what {one.path} reads is neither the residual stream nor a norm of it")


def _norm(seen: SeenNorm, prefix: str, path: str) -> Norm:
    for name, parameter in seen.call.module.named_parameters(recurse=False):
        if parameter.shape != seen.gain.shape:
            continue
        offset = seen.gain - parameter.detach().double()
        if float(offset.std()) < 1e-3:
            return Norm(f"{path}.{name}".removeprefix(prefix), float(round(float(offset.mean()), 2)), seen.centre)
    if float(seen.gain.std()) < 1e-3:
        return Norm(None, float(seen.gain.mean()), seen.centre)
    raise Unreadable(f"{path} scales by something else than its weight")
