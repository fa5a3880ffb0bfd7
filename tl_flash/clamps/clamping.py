"""Hold MLP neurons at chosen values while a TransformerLens model runs, by ordinary hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tl_flash.clamps.layer_hooks import LayerClamp, RowClamp, SiteHook
from tl_flash.clamps.positions import Positioned, Positions, parse_positions
from tl_flash.clamps.sites import At, Hook, attached, expert_site, neuron_site
from tl_flash.clamps.values import Mode, all_named_values, checked_value, require_mode
from tl_flash.names import AnyNeuron, ExpertNeuron, Neuron, NeuronKey, NeuronLike


@contextmanager
def clamp(
    model: Any,
    neurons: Mapping[NeuronKey, float | Tensor],
    *,
    mode: Mode = "set",
    positions: Positions = None,
    at: At = "post",
) -> Iterator[Any]:
    """Clamp neurons in every forward pass inside the context: calls, generation, caching, patching.

    It adds one hook a layer and takes away exactly its own on leaving, also after an exception. It outlives
    `model.reset_hooks()`, leaves all other hooks be, nests (the inner clamp acts on what the outer one left), and
    gradients flow through it, to the values too. Hooks on the same point run in the order in which they were added.

    Args:
        model: a HookedTransformer or a TransformerBridge, in compatibility mode or not.
        neurons: a value for each neuron; the neuron is a Neuron, a (layer, index) pair or "L3N17". The value is a
            number, or a tensor that broadcasts to [batch, position] of each pass (a scalar tensor fits all passes). A
            tensor is read anew in every pass, so that it may be trained. "L3E5N17", a neuron of an expert, is clamped
            on the tokens that are routed to it, in a HookedTransformer, whose experts have hooks.
        mode: "set" to the value, "add" it, "multiply" by it, "floor" (raise to at least), "ceil" (lower to at most).
        positions: which positions of the sequence, counted in columns from 0, a beginning-of-sequence token and
            padding included; the same tokens are clamped with and without a KV cache.

            - None: all.
            - one index or several: these, of the prompt or past it.
            - "prompt": the text given. In a plain forward pass that is every position.
            - "generated": what was generated and fed back. Generation is a pass that adds one position to the sequence
              before it, by a cache or by repeating it whole; two prompts one token apart, run one after the other, look
              the same.
            - "last": every position whose logits choose a generated token: the prompt's last, and all generated. In
              a plain forward pass that is the last column, which is padding in the shorter rows of a batch padded on
              the right.
        at: "post" is the neuron's activation, which W_out reads. On the way to it come "up", what W_in wrote (the
            pre-activation in an ungated MLP), and "gate", what W_gate wrote, before its activation function.

    Yields:
        The model.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a layer, neuron, mode, position or hook that does not exist; an MLP of which no hook carries single
            neurons (a bridge's mixture of experts); positions of an expert's neuron; a value that is not finite or
            does not fit; a neuron named twice; no neuron.
        RuntimeError: on leaving, where the clamp did nothing (no pass reached the hook, or one of the positions) or
            others removed its hook; an exception raised inside is never replaced. In a pass, where nothing tells
            which positions it holds.

    Example:
        >>> from tl_flash import clamp
        >>> with clamp(model, {"L1N3": 8.0, (0, 20): 0.0}, positions="last"):
        ...     logits = model("My favourite animal is")
    """
    clamps, entries = _build(neurons, mode, positions, at, model)
    with _held(model, clamps, entries):
        yield model


@contextmanager
def clamp_rows(
    model: Any,
    neurons: Sequence[NeuronLike],
    values: Sequence[float],
    *,
    mode: Mode = "set",
    positions: Positions = None,
) -> Iterator[Any]:
    """Clamp one neuron in each row of a batch, row i's hook_post of `neurons[i]` by `values[i]`: many clamps in a pass.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        neurons: one for each row of every pass in the context, as `clamp` takes them.
        values: as many.
        mode: as in `clamp`.
        positions: as in `clamp`.

    Yields:
        The model.

    Raises:
        TypeError: as in `clamp`.
        ValueError: as in `clamp`, another number of values than of neurons, or a pass of another number of rows.
        RuntimeError: as in `clamp`.

    Example:
        >>> from tl_flash.clamps import clamp_rows
        >>> from tl_flash import Neuron
        >>> with clamp_rows(model, [Neuron(1, 3), Neuron(1, 4)], [8.0, 8.0]):
        ...     logits = model(model.to_tokens(["One day,", "One day,"]))
    """
    require_mode(mode)
    if isinstance(neurons, str) or not isinstance(neurons, Sequence):
        raise TypeError(f"neurons: expected a list, one for each row, got {neurons!r}")
    if not neurons:
        raise ValueError("neurons: expected one for each row, got none, which would clamp nothing")
    if len(values) != len(neurons):
        raise ValueError(f"values: expected one for each of the {len(neurons)} neurons, got {len(values)}")
    own = [Neuron.of(neuron) for neuron in neurons]
    for neuron, value in zip(own, values, strict=True):
        checked_value(neuron, value)
    layers: dict[int, list[int]] = {}
    for row, neuron in enumerate(own):
        layers.setdefault(neuron.layer, []).append(row)
    sequence = _sequence(positions, min(layers), model)
    clamps = [
        RowClamp(neuron_site(model, layer, "post"), rows, own, values, mode, sequence) for layer, rows in layers.items()
    ]
    with _held(model, clamps, _entries(clamps, sequence)):
        yield model


@contextmanager
def _held(model: Any, clamps: Sequence[SiteHook], entries: list[tuple[str, Hook]]) -> Iterator[None]:
    with attached(model, entries):
        yield
    idle = [reason for reason in (c.idle() for c in clamps) if reason is not None]
    if idle:
        raise RuntimeError(f"clamp: it did nothing: {'; '.join(idle)}")


def clamp_hooks(
    neurons: Mapping[NeuronKey, float | Tensor],
    *,
    mode: Mode = "set",
    positions: Positions = None,
    at: At = "post",
    model: Any = None,
) -> list[tuple[str, Hook]]:
    """The hooks of a clamp, for `run_with_hooks(fwd_hooks=...)` and `model.hooks(fwd_hooks=...)`.

    Add all of them together: with `positions` the list begins with one or two hooks that change nothing and follow
    the sequence, so one list serves one model at a time. Nothing is checked after the last pass; `clamp` does that.

    Args:
        neurons: as in `clamp`.
        mode: as in `clamp`.
        positions: as in `clamp`.
        at: as in `clamp`; "up" and "gate" need the model.
        model: checks layers, neurons and hooks now, as `clamp` does. Without it a wrong one is found by the pass, and
            on bridges of TransformerLens 3, which ignore unknown hook names, never.

    Returns:
        Pairs of a hook name and a function of (activation, hook).

    Raises:
        TypeError: an argument of another kind.
        ValueError: as in `clamp`.

    Example:
        >>> from tl_flash import clamp_hooks
        >>> [name for name, _ in clamp_hooks({"L7N1234": 8.0, "L7N3": 0.0})]
        ['blocks.7.mlp.hook_post']
    """
    return _build(neurons, mode, positions, at, model)[1]


def _build(
    neurons: Mapping[NeuronKey, float | Tensor], mode: str, positions: Positions, at: At, model: Any
) -> tuple[list[SiteHook], list[tuple[str, Hook]]]:
    require_mode(mode)
    values = all_named_values(neurons)
    sites: dict[tuple[int, int | None], dict[AnyNeuron, float | Tensor]] = {}
    for neuron, value in values.items():
        expert = neuron.expert if isinstance(neuron, ExpertNeuron) else None
        sites.setdefault((neuron.layer, expert), {})[neuron] = value
        if expert is not None:
            _require_every_token(neuron, value, positions)
    sequence = _sequence(positions, min(layer for layer, _ in sites), model)
    clamps: list[SiteHook] = []
    for (layer, expert), members in sites.items():
        site = neuron_site(model, layer, at) if expert is None else expert_site(model, layer, expert, at)
        clamps.append(LayerClamp(site, members, mode, sequence))
    return clamps, _entries(clamps, sequence)


def _require_every_token(neuron: AnyNeuron, value: float | Tensor, positions: Positions) -> None:
    """An expert is given the tokens that are routed to it, and not their positions."""
    if positions is not None:
        raise ValueError(f"positions: {neuron} is an expert's, whose tokens come without positions; leave them out")
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(
            f"value of {neuron}: expected one number, as an expert's tokens come without positions, got a tensor of "
            f"shape {list(value.shape)}"
        )


def _sequence(positions: Positions, layer: int, model: Any) -> Positioned | None:
    chosen = parse_positions(positions)
    return None if chosen is None else Positioned(chosen, layer, model)


def _entries(clamps: Sequence[SiteHook], sequence: Positioned | None) -> list[tuple[str, Hook]]:
    tracking = [] if sequence is None else sequence.hooks()
    return [*tracking, *((c.site.name, c) for c in clamps)]
