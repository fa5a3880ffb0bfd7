"""What a model predicts under many clamps, each alone, several of them in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tl_flash.clamps.answers import Answers
from tl_flash.clamps.clamping import clamp_rows
from tl_flash.clamps.positions import Positions
from tl_flash.clamps.prompts import Prompts
from tl_flash.clamps.values import Mode
from tl_flash.names import Neuron

_ANSWERS_AT_ONCE = 2**25
"""Logits of the last positions that are held at a time."""


def answers_alone(
    model: Any,
    prompts: Prompts,
    doses: Sequence[tuple[Neuron, float]],
    *,
    mode: Mode = "set",
    positions: Positions = None,
    batch_size: int | None = None,
) -> Iterator[Answers]:
    """The model's answers to all prompts under each clamp in turn.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        prompts: every one is run under every clamp.
        doses: a neuron and the value that its hook_post is clamped by.
        mode: as in `clamp`.
        positions: as in `clamp`.
        batch_size: rows of a forward pass, a row being one prompt under one clamp.

    Yields:
        Answers of [prompt, d_vocab], one for each dose.

    Raises:
        TypeError: as in `clamp`.
        ValueError: as in `clamp`.
        RuntimeError: as in `clamp`.

    Example:
        >>> from tl_flash.clamps import answers_alone
        >>> from tl_flash import Neuron
        >>> from tl_flash.clamps import Prompts
        >>> doses = [(Neuron(1, 3), 4.0), (Neuron(0, 7), -4.0)]
        >>> [len(answers.logits) for answers in answers_alone(model, Prompts.of(model, ["One day,"]), doses)]
        [1, 1]
    """
    n = len(prompts.rows)
    at_once = max(1, _ANSWERS_AT_ONCE // (n * model.W_U.shape[1]))
    for start in range(0, len(doses), at_once):
        some = doses[start : start + at_once]

        def held(rows: list[int], some: Sequence[tuple[Neuron, float]] = some) -> Any:
            neurons, values = zip(*(some[row // n] for row in rows), strict=True)
            return clamp_rows(model, neurons, values, mode=mode, positions=positions)

        answers = Answers.of(model, Prompts(prompts.rows * len(some)), batch_size, held=held)
        for i in range(len(some)):
            yield answers[i * n : (i + 1) * n]
