"""What a neuron does: on a text, by dose, between which doses, beside matched controls; and which made a prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tl_flash.clamps import NEUTRAL_PROMPTS, Prompts, activations_on, attached
from tl_flash.evidence import DOSE, clamp_sweep, dose_window, explain, first_guess, validate
from tl_flash.explore.jobs import Job
from tl_flash.explore.session import Session
from tl_flash.names import Neuron
from tl_flash.show.report import contents

DOSES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)
"""Multiples of a neuron's max|hook_post|."""
SWEPT, WRITTEN, VALIDATED, CONTROLS = 8, 3, 8, 10
"""Neutral prompts that a dose curve, a dose window and a validation take, and the last one's controls."""
MOST_POSITIONS = 1024
EXPLAINED = 12
"""Neurons that an explanation names."""
FIRST = 0.25
"""Of the dose at which what a neuron writes is half as long as the residual stream."""


@contextmanager
def passes(session: Session, job: Job, what: str) -> Iterator[None]:
    """Tell each forward pass inside, and end at the next one where the job is cancelled."""
    count = 0

    def see(residual: Tensor, hook: Any) -> Tensor:
        nonlocal count
        count += 1
        job.watch(what, count, None)
        return residual

    with attached(session.model, [("blocks.0.hook_resid_pre", see)]):
        yield


def unit(session: Session, job: Job, neuron: Neuron) -> None:
    """What dose 1 of a neuron is, and the first to try, with which a search for the dose window begins; tells `unit`.

    Raises:
        ValueError: a neuron that does not exist, has no unit or writes nothing.
    """
    own = session.unit_of(neuron)
    first = FIRST * first_guess(session.model, {neuron: own}, Prompts.of(session.model, NEUTRAL_PROMPTS[:WRITTEN]))
    job.tell("unit", neuron=str(neuron), unit=own, first=first, range=session.range_of(neuron))


def activations(session: Session, job: Job, neuron: Neuron, text: str) -> None:
    """A neuron's activation at every token of a text, and its range on the session's; tells `activations`.

    Raises:
        ValueError: a neuron that does not exist, or a text of too many tokens.
    """
    prompts = Prompts.of(session.model, [text])
    (row,) = prompts.rows
    if len(row) > MOST_POSITIONS:
        raise ValueError(f"text: expected at most {MOST_POSITIONS} tokens, got {len(row)}")
    (values,) = activations_on(session.model, prompts, neuron)
    tokens = [session.token(id) | {"value": v} for id, v in zip(row.tolist(), values.tolist(), strict=True)]
    job.tell("activations", neuron=str(neuron), tokens=tokens, range=session.range_of(neuron))


def dose_curve(session: Session, job: Job, neuron: Neuron, token: int, sign: int) -> None:
    """A token's probability after neutral prompts as the neuron is set to rising doses; tells `dose`."""
    unit = session.unit_of(neuron)
    values = [sign * dose * unit for dose in DOSES]
    with passes(session, job, f"clamping {neuron}"):
        curve = clamp_sweep(session.model, neuron, values, NEUTRAL_PROMPTS[:SWEPT], [token])
    unclamped, *rows = curve.to_frame().to_dict("records")
    points = [
        {"dose": sign * dose, "value": value, "prob": row["prob"], "low": row["prob_low"], "high": row["prob_high"]}
        for dose, value, row in zip(DOSES, values, rows, strict=True)
    ]
    told = {"unit": unit, "unclamped": unclamped["prob"], "points": points, "prompts": SWEPT}
    job.tell("dose", neuron=str(neuron), token=session.token(token), **told)


def window(session: Session, job: Job, neuron: Neuron, token: int, sign: int) -> None:
    """From which dose a token shows in what the model writes, and up to which the text reads; tells `window`."""
    unit = session.unit_of(neuron)
    with passes(session, job, f"writing under {neuron}"):
        found = dose_window(
            session.model, {neuron: sign * unit}, NEUTRAL_PROMPTS[:WRITTEN], tokens=[token], max_new_tokens=16
        )
    doses = [contents.jsonable(record) for record in found.to_frame().to_dict("records")]
    job.tell("window", neuron=str(neuron), sign=sign, low=found.low, high=found.high, told=repr(found), doses=doses)


def validation(session: Session, job: Job, neuron: Neuron, token: int, sign: int) -> None:
    """Whether the neuron, at the dose of `validate`, raises a token more than like neurons do; tells `validated`."""
    value = sign * DOSE * session.unit_of(neuron)
    with passes(session, job, f"clamping {neuron} and controls"):
        tested = validate(
            session.model,
            {neuron: token},
            prompts=NEUTRAL_PROMPTS[:VALIDATED],
            value=value,
            controls=CONTROLS,
            batch_size=VALIDATED,
        )
    (record,) = tested.to_frame().to_dict("records")
    effects = tested.control_effects[0].tolist()
    job.tell("validated", record=contents.jsonable(record), controls=effects, dose=sign * DOSE, prompts=VALIDATED)


def explanation(session: Session, job: Job, before: list[int], token: int) -> None:
    """The neurons that made the unclamped model predict a token after some others, to first order; tells `explained`.

    Raises:
        ValueError: what `explain` refuses.
    """
    with passes(session, job, "explaining"):
        found = explain(session.model, torch.tensor(before), token=token, n=EXPLAINED, measure=False)
    job.tell("explained", explanation=found.to_dict() | {"model": session.name})
