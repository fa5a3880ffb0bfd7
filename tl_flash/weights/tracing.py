"""Find a model's layout by watching one forward pass of a few tokens: by which tensors are the same, and by gradients.

Nothing is known of any class. The unembedding is what answers the logits; the norm before it, what answers the
unembedding's input; the stack of layers, the list whose last item answers that norm's input. In a layer, neurons lie
between linear maps (`dense`) or in a module of experts (`experts`); the norm that they read and those that what they
write passes are told by where the same numbers come again, and by gradients that are 1 in one place and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_flash.weights.calls import (
    Call,
    Unreadable,
    carried,
    of_linear,
    passes,
    passes_beside,
    record,
    run,
    same,
)
from tl_flash.weights.dense import Seen, dense_neurons
from tl_flash.weights.experts import routed_neurons
from tl_flash.weights.layouts import LayerLayout, Layout
from tl_flash.weights.places import Place
from tl_flash.weights.seen_norms import SeenNorm, as_norm


def trace(model: nn.Module, **inputs: Tensor) -> Layout:
    """The layout of a model, by a forward pass; its numbers must be random, so that no two tensors are alike.

    Raises:
        ValueError: what lies between the last layer and the logits is more than a norm and a linear map, or the layers
            are not run one after the other.
    """
    calls, answer = record(model, inputs)
    head = _head(calls, answer.logits)
    stacks = [*_stacks(model, calls)]
    final, factor, stack, n_streams = _last(stacks, calls, head)
    transposed = of_linear(head)
    if transposed is None:
        raise Unreadable(f"{head.path} is no linear map by its weight alone")
    weight, own = head.weight, f"{head.path}.weight"
    return Layout(
        class_name=type(model).__name__,
        root=stack.path + ".",
        layers=tuple(_layer(stack.path, layer, calls) for layer in range(len(stack.calls))),
        final=None if final is None else final.named(""),
        unembedding=Place(own, transposed),
        shared_with=tuple(name for name, other in _named(model) if other is weight and name != own),
        d_model=head.x.shape[-1],
        scale=factor * _slope(model, inputs, head),
        n_streams=n_streams,
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
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and f"{path}.{len(module) - 1}" in by_path:
            yield _Stack(path, [by_path.get(f"{path}.{layer}", []) for layer in range(len(module))])


def _last(stacks: Sequence[_Stack], calls: Sequence[Call], head: Call) -> tuple[SeenNorm | None, float, _Stack, int]:
    """The norm before the unembedding, what its output is multiplied by, the stack that it reads, and its streams."""
    for stack in stacks:
        if same(stack.calls[-1][-1].y, head.x):
            return None, 1.0, _in_order(stack), 1
    for call in reversed(calls[: head.order]):
        factors = carried(head.x, call.y) if call.y.shape == head.x.shape else None
        norm = None if factors is None else as_norm(call)
        if factors is None or norm is None:
            continue
        read = [(stack, n) for stack in stacks if (n := _streams(call.x, stack.calls[-1][-1].y))]
        if read:
            if float(factors.std()) > 1e-6 * float(factors.mean()):
                raise Unreadable(f"{head.path} reads what {call.path} answers, each position scaled by another factor")
            return norm, float(factors.mean()), _in_order(read[0][0]), read[0][1]
    raise Unreadable("between the last layer and the unembedding is more than a norm")


def _streams(x: Tensor, y: Tensor) -> int:
    """How many residual streams y holds of which x is, at each position, a sum with positive factors; 0 if it is none.

    Hyper-connections keep several streams. Every direction that is in all of them is, up to its length, in such a sum.
    """
    if same(x, y):
        return 1
    if y.ndim != x.ndim + 1 or y.shape[:-2] + y.shape[-1:] != x.shape or not 1 < y.shape[-2] < x.shape[-1] // 2:
        return 0
    x, y = x.detach().double(), y.detach().double()
    factors = torch.linalg.lstsq(y.mT, x[..., None]).solution
    off = (y.mT @ factors)[..., 0] - x
    return y.shape[-2] if bool((factors > 0).all()) and float(off.norm()) <= 1e-9 * float(x.norm()) else 0


def _in_order(stack: _Stack) -> _Stack:
    if any(len(layer) > 1 for layer in stack.calls):
        raise Unreadable(f"layers of {stack.path} run more than once")
    layers = [layer[0] for layer in stack.calls if layer]
    if any(not same(after.x, before.y) for before, after in zip(layers, layers[1:], strict=False)):
        raise Unreadable(f"a layer of {stack.path} reads something else than the layer before it answers")
    return stack


# Within a layer


def _layer(stack: str, layer: int, calls: Sequence[Call]) -> LayerLayout:
    path = f"{stack}.{layer}"
    inside = [call for call in calls if call.path.startswith(path + ".")]
    out = next((call for call in calls if call.path == path), None)
    if out is None:
        return LayerLayout(fault="it does not run on text alone")
    try:
        seen = [*routed_neurons(inside, path), *dense_neurons(inside, path, out)]
        if not seen:
            return LayerLayout()
        over = [norm for one in seen if (norm := one.neurons.norm) is not None]
        if over and (len(seen) > 1 or (over[0].centre and over[0].weight is None)):
            raise Unreadable("a norm over its neurons does more than to scale those of its one MLP")
        norms = [norm for call in inside if call.x.shape[-1] == out.y.shape[-1] and (norm := as_norm(call)) is not None]
        posts = [_posts(norms, one, out, inside) for one in seen]
        pres = [_pre(norms, one, out, inside, _written(seen, posts, out)) for one in seen]
        pre, post = _one_of(pres, "read"), _one_of([tuple(post) for post in posts], "pass")
    except Unreadable as fault:
        return LayerLayout(fault=str(fault))
    return LayerLayout(
        neurons=tuple(dict.fromkeys(one.neurons for one in sorted(seen, key=lambda one: not one.neurons.routed))),
        pre=None if pre is None else pre.named(path),
        post=tuple(one.named(path) for one in post),
    )


def _one_of(given: list[Any], verb: str) -> Any:
    if any(one is not given[0] and one != given[0] for one in given):
        raise Unreadable(f"its MLPs {verb} several norms")
    return given[0]


# The norms around neurons


def _posts(norms: Sequence[SeenNorm], one: Seen, out: Call, inside: Sequence[Call]) -> list[SeenNorm]:
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


def _written(seen: Sequence[Seen], posts: Sequence[list[SeenNorm]], out: Call) -> list[tuple[Tensor, list[Tensor]]]:
    """Where what MLPs write is added, and what: into each norm after them, and into what the layer answers."""
    first = [(post[0].call.x, [one.y for one in seen]) for post in posts if post]
    last = [post[-1].call.y if post else one.y for one, post in zip(seen, posts, strict=True)]
    return [*first, (out.y, last)]


def _pre(
    norms: Sequence[SeenNorm],
    one: Seen,
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
    reads = [call.x for call in inside if carried(one.x, call.x) is not None]
    if carried(one.x, out.x) is not None or any(map(is_stream, reads)):
        return None
    raise Unreadable(f"what {one.path} reads is neither the residual stream nor a norm of it")
