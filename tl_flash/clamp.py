"""Hold MLP neurons at chosen values while a TransformerLens model runs, by ordinary hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tl_flash.hooks import (
    At,
    Hook,
    Positioned,
    Positions,
    Site,
    attached,
    neuron_site,
    parse_positions,
    refuse_block_hook,
)
from tl_flash.neurons import Neuron, NeuronLike, by_layer

Mode = Literal["set", "add", "multiply", "floor", "ceil"]

_APPLY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "set": lambda act, value: value.expand_as(act),
    "add": torch.add,
    "multiply": torch.mul,
    "floor": torch.maximum,
    "ceil": torch.minimum,
}


@contextmanager
def clamp(
    model: Any,
    neurons: Mapping[NeuronLike, float | Tensor],
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
            tensor is read anew in every pass, so that it may be trained.
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
        ValueError: a layer, neuron, mode, position or hook that does not exist; an MLP without single neurons (a
            mixture of experts); a value that is not finite or does not fit; a neuron named twice; no neuron.
        RuntimeError: on leaving, where the clamp did nothing (no pass reached the hook, or one of the positions) or
            others removed its hook; an exception raised inside is never replaced. In a pass, where nothing tells
            which positions it holds.

    Example:
        >>> from tl_flash.clamp import clamp
        >>> with clamp(model, {"L1N3": 8.0, (0, 20): 0.0}, positions="last"):
        ...     logits = model("My favourite animal is")
    """
    clamps, entries = _build(neurons, mode, positions, at, model)
    with _held(model, clamps, entries):
        yield model


@contextmanager
def clamp_rows(
    model: Any,
    neurons: Sequence[Neuron],
    values: Sequence[float],
    *,
    mode: Mode = "set",
    positions: Positions = None,
) -> Iterator[Any]:
    """Clamp one neuron in each row of a batch, row i's hook_post of `neurons[i]` by `values[i]`: many clamps in a pass.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        neurons: one for each row of every pass in the context.
        values: as many.
        mode: as in `clamp`.
        positions: as in `clamp`.

    Yields:
        The model.

    Raises:
        TypeError: as in `clamp`.
        ValueError: as in `clamp`, or a pass of another number of rows.
        RuntimeError: as in `clamp`.

    Example:
        >>> from tl_flash.clamp import clamp_rows
        >>> from tl_flash.neurons import Neuron
        >>> with clamp_rows(model, [Neuron(1, 3), Neuron(1, 4)], [8.0, 8.0]):
        ...     logits = model(model.to_tokens(["One day,", "One day,"]))
    """
    _require_mode(mode)
    if not neurons:
        raise ValueError("neurons: expected one for each row, got none, which would clamp nothing")
    for neuron, value in zip(neurons, values, strict=True):
        _checked(neuron, value)
    layers: dict[int, list[int]] = {}
    for row, neuron in enumerate(neurons):
        layers.setdefault(neuron.layer, []).append(row)
    sequence = _sequence(positions, min(layers), model)
    clamps = [
        _RowClamp(neuron_site(model, layer, "post"), rows, neurons, values, mode, sequence)
        for layer, rows in layers.items()
    ]
    with _held(model, clamps, _entries(clamps, sequence)):
        yield model


@contextmanager
def _held(model: Any, clamps: Sequence[_SiteHook], entries: list[tuple[str, Hook]]) -> Iterator[None]:
    with attached(model, entries):
        yield
    idle = [reason for reason in (c.idle() for c in clamps) if reason is not None]
    if idle:
        raise RuntimeError(f"clamp: it did nothing: {'; '.join(idle)}")


def clamp_hooks(
    neurons: Mapping[NeuronLike, float | Tensor],
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
        >>> from tl_flash.clamp import clamp_hooks
        >>> [name for name, _ in clamp_hooks({"L7N1234": 8.0, "L7N3": 0.0})]
        ['blocks.7.mlp.hook_post']
    """
    return _build(neurons, mode, positions, at, model)[1]


def _build(
    neurons: Mapping[NeuronLike, float | Tensor], mode: str, positions: Positions, at: At, model: Any
) -> tuple[list[_SiteHook], list[tuple[str, Hook]]]:
    _require_mode(mode)
    values = _named_values(neurons)
    layers = by_layer(values)
    sequence = _sequence(positions, min(layers), model)
    clamps: list[_SiteHook] = [
        _LayerClamp(neuron_site(model, layer, at), {n: values[n] for n in members}, mode, sequence)
        for layer, members in layers.items()
    ]
    return clamps, _entries(clamps, sequence)


def _require_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")


def _sequence(positions: Positions, layer: int, model: Any) -> Positioned | None:
    chosen = parse_positions(positions)
    return None if chosen is None else Positioned(chosen, layer, model)


def _entries(clamps: Sequence[_SiteHook], sequence: Positioned | None) -> list[tuple[str, Hook]]:
    tracking = [] if sequence is None else sequence.hooks()
    return [*tracking, *((c.site.name, c) for c in clamps)]


def _named_values(neurons: Mapping[NeuronLike, float | Tensor]) -> dict[Neuron, float | Tensor]:
    if not isinstance(neurons, Mapping):
        raise TypeError(f"neurons: expected a dict of neuron to value, got {type(neurons).__name__}")
    if not neurons:
        raise ValueError("neurons: expected at least one neuron, got an empty dict, which would clamp nothing")
    values: dict[Neuron, float | Tensor] = {}
    for name, value in neurons.items():
        neuron = Neuron.of(name)
        if neuron in values:
            raise ValueError(f"neurons: {neuron} is named twice; give it one value")
        values[neuron] = _checked(neuron, value)
    return values


def _checked(neuron: Neuron, value: Any) -> float | Tensor:
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


class _SiteHook:
    """The hook of one layer: takes activations [batch, position, d_mlp] and returns them clamped."""

    def __init__(self, site: Site, neurons: Sequence[Neuron], sequence: Positioned | None):
        self.site = site
        self._neurons = list(neurons)
        self._sequence = sequence
        self._fired = False
        self._last_pass = 0
        self._reached: set[int] = set()
        if site.d_mlp is not None:
            self._require_width(site.d_mlp)

    def __call__(self, act: Tensor, hook: Any) -> Tensor:
        refuse_block_hook(hook.name)
        self._require_width(act.shape[-1])
        self._fired = True
        columns = self._columns(act.shape[-2])
        if columns is not None and not columns:
            return act
        return self._clamped(act, columns)

    def _clamped(self, act: Tensor, columns: list[int] | None) -> Tensor:
        raise NotImplementedError

    def idle(self) -> str | None:
        """What this clamp was asked to do and never did, or None."""
        if not self._fired:
            return f"no forward pass went through {self.site.name}"
        missed = None if self._sequence is None else self._sequence.missed(self._reached)
        return None if missed is None else f"at {self.site.name}, no pass reached {missed}"

    def _columns(self, width: int) -> list[int] | None:
        """The columns to clamp in this pass, or None for all."""
        sequence = self._sequence
        if sequence is None:
            return None
        if sequence.passes == self._last_pass or sequence.width != width:
            raise RuntimeError(
                f"positions: {self.site.name} saw {width} columns, but the attention hook that tells their positions, "
                f"{sequence.name}, did not see this pass; clamp every position, or a model that has that hook"
            )
        self._last_pass = sequence.passes
        columns = sequence.columns()
        self._reached.update(sequence.start + column for column in columns)
        return columns

    def _require_width(self, d_mlp: int) -> None:
        for neuron in self._neurons:
            if neuron.index >= d_mlp:
                raise ValueError(f"neuron {neuron}: expected an index below {d_mlp}, the neurons of {self.site.name}")


class _LayerClamp(_SiteHook):
    """Several neurons, in every row."""

    def __init__(
        self, site: Site, values: dict[Neuron, float | Tensor], mode: str, sequence: Positioned | None
    ) -> None:
        super().__init__(site, list(values), sequence)
        self._values = list(values.values())
        self._mode = mode

    def __repr__(self) -> str:
        return f"clamp({self._mode}, {len(self._neurons)} neurons)"

    def _clamped(self, act: Tensor, columns: list[int] | None) -> Tensor:
        neurons = torch.tensor([neuron.index for neuron in self._neurons], device=act.device)
        values = self._stack_values(act)  # [neuron] or [batch, position, neuron]
        where: tuple[Any, ...] = (..., neurons)
        if columns is not None:
            rows = torch.tensor(columns, device=act.device)
            where = (..., rows[:, None], neurons)
            if values.ndim > 1 and values.shape[-2] > 1:
                values = values[..., rows, :]
        clamped = act.clone()  # in place, the backward pass of ReLU would break
        clamped[where] = _APPLY[self._mode](act[where], values)
        return clamped

    def _stack_values(self, act: Tensor) -> Tensor:
        """The values, [neuron] or broadcastable to [batch, position, neuron]; read anew, as they may be trained."""
        if any(isinstance(value, Tensor) for value in self._values):
            each = (torch.as_tensor(value).to(act) for value in self._values)
            values = torch.stack(torch.broadcast_tensors(*each), dim=-1)
        else:
            values = torch.tensor(self._values, dtype=torch.float64).to(act)
        _require_finite(values, act)
        if not _fits(values.shape[:-1], act.shape[:-1]):
            raise ValueError(
                f"neurons: expected values that broadcast to [batch, position] = {list(act.shape[:-1])} of this pass, "
                f"got {list(values.shape[:-1])}; a scalar fits every pass"
            )
        return values


class _RowClamp(_SiteHook):
    """One neuron in each of some rows."""

    def __init__(
        self,
        site: Site,
        rows: list[int],
        neurons: Sequence[Neuron],
        values: Sequence[float],
        mode: Mode,
        sequence: Positioned | None,
    ) -> None:
        super().__init__(site, [neurons[row] for row in rows], sequence)
        self._rows, self._values, self._batch = rows, [values[row] for row in rows], len(neurons)
        self._mode = mode

    def __repr__(self) -> str:
        return f"clamp({self._mode}, {len(self._rows)} rows)"

    def _clamped(self, act: Tensor, columns: list[int] | None) -> Tensor:
        if act.ndim != 3 or act.shape[0] != self._batch:
            raise ValueError(f"clamp_rows: expected passes of {self._batch} rows, got activations {list(act.shape)}")
        rows, neurons = (
            torch.tensor(part, device=act.device)[:, None]
            for part in (self._rows, [neuron.index for neuron in self._neurons])
        )
        where = torch.tensor(range(act.shape[1]) if columns is None else columns, device=act.device)
        values = torch.tensor(self._values, dtype=torch.float64).to(act)[:, None]
        _require_finite(values, act)
        clamped = act.clone()
        clamped[rows, where, neurons] = _APPLY[self._mode](act[rows, where, neurons], values)
        return clamped


def _require_finite(values: Tensor, act: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"neurons: some values are not finite in the model's {act.dtype}; give smaller ones")


def _fits(shape: torch.Size, into: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(into), strict=False)
    return len(shape) <= len(into) and all(size in (1, whole) for size, whole in pairs)
