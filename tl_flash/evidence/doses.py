"""Search for the dose window: where a clamp shows in what a model writes, and the text still reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_flash.clamps import Mode, Positions, Prompts, PromptsLike, clamp, named_values, residual_length
from tl_flash.evidence.asked import asked_tokens
from tl_flash.evidence.fluency import Fluency, continuations
from tl_flash.evidence.mentions import mentions, require_word
from tl_flash.evidence.window import DoseWindow
from tl_flash.names import Neuron, NeuronKey
from tl_flash.progress import track
from tl_flash.weights import chosen_layers, read

WRITTEN = 0.5
"""First guess: the dose at which what the neurons write is half as long as the residual stream that it is added to."""
_AROUND = (-2, -1, 0, 1, 2)
"""Powers of two of the first guess that are tried before the window's ends are searched."""
_HALVINGS = 3


def dose_window(
    model: Any,
    neurons: Mapping[NeuronKey, float],
    prompts: PromptsLike,
    word: str | None = None,
    *,
    tokens: Sequence[str | int] | None = None,
    chat: bool = False,
    doses: Sequence[float] | None = None,
    share: float = 0.5,
    most_perplexity: float = 2.0,
    least_distinct: float = 0.8,
    mode: Mode = "set",
    positions: Positions = None,
    max_new_tokens: int = 24,
    progress: bool | None = None,
) -> DoseWindow:
    """Find the doses at which a clamp shows in what a model writes while the text still reads.

    Completions are greedy. Each is read by the unclamped model: perplexity alone would reward repetition, so the share
    of distinct bigrams counts beside it; both are relative to the unclamped model's own completions.

    Args:
        model: a HookedTransformer or a TransformerBridge with a tokenizer.
        neurons: what each is clamped by at dose 1, such as its max|hook_post| with the sign that raises the word.
        prompts: to complete, as `Prompts.of` takes them.
        word: shows where a completion `mentions` it.
        tokens: in place of a word: shows where one of these is among the completion's tokens.
        chat: each text is what a user says, in the tokenizer's chat template.
        doses: multiples of the units to try. By default a first guess comes from the weights, the dose at which what
            the neurons write is half as long as the residual stream there; it is tried from a quarter to four times,
            and the ends of the window, each between two doses tried, are halved three times, to 9%.
        share: of the completions in which it has to show.
        most_perplexity: of a completion that reads, over that of the unclamped model's own.
        least_distinct: share of distinct bigrams of a completion that reads, over that of the unclamped model's own.
        mode: as in `clamp`.
        positions: as in `clamp`.
        max_new_tokens: length of a completion at most.
        progress: a bar; by default on a terminal or in a notebook.

    Raises:
        TypeError: an argument of another kind.
        ValueError: neither or both of word and tokens, an empty word, an unknown token, no neurons, a unit of 0, doses
            that are not above 0, or what `clamp` refuses.

    Example:
        >>> window = dose_window(model, {"L1N3": 2.0}, ["One day,"], tokens=[5], doses=[0.5, 1.0], max_new_tokens=3)
        >>> window.doses.tolist(), window.low is None or window.low in (0.5, 1.0)
        ([0.0, 0.5, 1.0], True)
    """
    units = {neuron: float(unit) for neuron, unit in named_values(neurons).items()}
    if not all(units.values()):
        raise ValueError(f"neurons: expected units that are not 0, got {units}")
    if doses is not None:
        require_doses(doses)
    elif mode == "multiply":
        raise ValueError(
            'doses: expected a list; for mode="multiply" there is no first guess, its units are no activations'
        )
    if not 0 < share <= 1:
        raise ValueError(f"share: expected one above 0 and up to 1, got {share}")
    if not most_perplexity > 0 or not least_distinct >= 0:
        raise ValueError(
            f"most_perplexity, least_distinct: expected above 0, and 0 or more, got {most_perplexity}, {least_distinct}"
        )
    texts = Prompts.of(model, prompts, chat=chat)
    shows, looked_for = _shows(model, word, tokens)
    tried: dict[float, tuple[list[str], list[bool], Fluency]] = {}

    def attempt(dose: float) -> None:
        values = {neuron: dose * unit for neuron, unit in units.items()}
        held = partial(clamp, model, values, mode=mode, positions=positions) if dose else nullcontext
        written = continuations(model, texts, max_new_tokens, held=held)
        said = [model.tokenizer.decode(row, skip_special_tokens=True) for row in written]
        tried[dose] = (
            said,
            [shows(*pair) for pair in zip(said, written, strict=True)],
            Fluency.of(model, texts, written),
        )

    def window() -> DoseWindow:
        order = sorted(tried)
        said, shown, fluency = zip(*(tried[dose] for dose in order), strict=True)
        return DoseWindow(
            units=units,
            looked_for=looked_for,
            doses=torch.tensor(order),
            completions=tuple(map(tuple, said)),
            shows=torch.tensor(shown),
            perplexity=torch.stack([one.perplexity for one in fluency]),
            distinct=torch.stack([one.distinct for one in fluency]),
            share=share,
            most_perplexity=most_perplexity,
            least_distinct=least_distinct,
        )

    searched = doses is None
    if doses is None:
        guess = first_guess(model, units, texts)
        doses = [guess * 2.0**power for power in _AROUND]
    for dose in track([0.0, *map(float, doses)], "doses", progress, total=len(doses) + 1):
        attempt(dose)
    for _ in range(_HALVINGS if searched else 0):
        for dose in _between(window()):
            attempt(dose)
    return window()


def first_guess(model: Any, units: Mapping[Neuron, float], prompts: Prompts) -> float:
    """The dose at which what neurons write is half as long as the residual stream after their layer, on these prompts.

    Neurons of several layers count where they write most, beside the stream there.
    """
    weights, layers = read(model), sorted({neuron.layer for neuron in units})
    weights.require_layers(chosen_layers(layers, weights.n_layers))
    for neuron in units:
        if neuron.index >= weights.d_mlp:
            raise ValueError(f"neurons: expected indices below d_mlp = {weights.d_mlp}, got {neuron}")
    lengths = residual_length(model, prompts, layers)
    shares = []
    for layer in layers:
        own = {neuron.index: unit for neuron, unit in units.items() if neuron.layer == layer}
        written = torch.tensor(list(own.values())) @ weights.directions(layer, "out").float().cpu()[list(own)]
        shares.append(float(written.norm()) / lengths[layer])
    if not max(shares) > 0:
        raise ValueError(f"neurons: {', '.join(map(str, units))} write nothing (W_out is 0); give others")
    return WRITTEN / max(shares)


def require_doses(doses: Sequence[float]) -> None:
    """Refuse what are no doses.

    Raises:
        TypeError: no list.
        ValueError: none, or some that are not above 0 and finite.
    """
    if not isinstance(doses, Sequence | Tensor | np.ndarray):
        raise TypeError(f"doses: expected a list of numbers, got {doses!r}")
    if len(doses) == 0 or not all(0 < dose < math.inf for dose in doses):
        raise ValueError(f"doses: expected at least one, all above 0 and finite, got {list(doses)}")


def _between(window: DoseWindow) -> list[float]:
    """Doses midway, by their ratio, between the ends of the window and their neighbours on the other side."""
    doses, found = window.doses.tolist(), []
    if window.low is not None:
        found.append((doses[doses.index(window.low) - 1], window.low))
    if window.high is not None and window.high < doses[-1]:
        found.append((window.high, doses[doses.index(window.high) + 1]))
    return sorted({math.sqrt(below * above) if below else above / 2 for below, above in found} - set(doses))


def _shows(
    model: Any, word: str | None, tokens: Sequence[str | int] | None
) -> tuple[Callable[[str, Tensor], bool], str]:
    """Whether a completion, its text and its tokens, speaks of what is looked for; and what that is called."""
    if word is None and tokens is None or word is not None and tokens is not None:
        raise ValueError("word: expected a word or tokens=, got " + ("neither" if word is None else "both"))
    if tokens is None:
        spoken = require_word(word)
        return (lambda text, _: mentions(text, spoken)), spoken
    named = asked_tokens(model, tokens)
    return (lambda _, row: not named.keys().isdisjoint(row.tolist())), ", ".join(named[id] for id in sorted(named))
