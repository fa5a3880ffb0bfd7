"""What a model writes after a prompt, as it is and clamped, token by token, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps import Prompts, Stepper, clamp_hooks, require_room
from tl_flash.evidence import Fluency
from tl_flash.explore.asked import Writing
from tl_flash.explore.jobs import Job
from tl_flash.explore.session import Session

LOGITS_AT_ONCE = 2**26
SHOWN = 8
"""Likeliest tokens of each position that the page is told."""


@dataclass
class Answer:
    """One continuation, as far as it is written."""

    first: Float[Tensor, " d_vocab"]
    """Log-probabilities of its first token."""
    ids: list[int] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    log_probs: list[Float[Tensor, " d_vocab"]] = field(default_factory=list)
    """Of each of its tokens, where they are kept."""


def write(session: Session, job: Job, asked: Writing) -> None:
    """Continue a prompt greedily; with doses, also under their clamp, both at once.

    It tells `tokens` (of stream "prompt", "plain" and "steered"), `next` (the first token's probabilities) and, of a
    clamp, `measures`.

    Raises:
        ValueError: a prompt that is too long, a neuron that does not exist or has no unit, or what `clamp` refuses.
    """
    prompts = Prompts.of(session.model, [asked.prompt], chat=asked.chat)
    (prompt,) = prompts.rows
    most = min(session.model.cfg.n_ctx, LOGITS_AT_ONCE // session.d_vocab) - asked.n_tokens
    if len(prompt) > most:
        raise ValueError(f"prompt: expected at most {most} tokens beside {asked.n_tokens} new ones, got {len(prompt)}")
    require_room(session.model, prompts, asked.n_tokens)
    hooks = _hooks(session, job, asked)
    key = (asked.prompt, asked.chat, asked.n_tokens)
    known = session.written.get(key)
    stepper = Stepper(session.model)
    if known is None:
        logits = stepper.read(prompt).log_softmax(-1)
        told, first = _prompt(session, prompt, logits), logits[-1]
        plain, turns = Answer(first), _steps(session, stepper, first, asked.n_tokens)
    else:
        told, plain = known
        turns = iter(())
        first = plain.first
    job.tell("tokens", stream="prompt", tokens=told)
    clamped = None if hooks is None else Stepper(session.model, hooks)
    steered = None if clamped is None else Answer(clamped.read(prompt)[-1].log_softmax(-1))
    job.tell("next", tokens=_next(session, first, None if steered is None else steered.first))
    others: Iterator[Any] = iter(())
    if clamped is not None and steered is not None:
        others = _steps(session, clamped, steered.first, asked.n_tokens)
    if known is not None:
        job.tell("tokens", stream="plain", tokens=plain.told)
    _together(job, {"plain": (plain, turns), "steered": (steered, others)})
    session.written.keep(key, (told, plain))
    if steered is not None:
        job.tell("measures", **_measures(session, prompts, plain, steered))


def _hooks(session: Session, job: Job, asked: Writing) -> Any:
    if not asked.doses:
        return None
    units = {neuron: session.unit_of(neuron) for neuron in asked.doses}
    values = {n: dose if asked.mode == "multiply" else dose * units[n] for n, dose in asked.doses.items()}
    positions: Any = None if asked.positions == "all" else asked.positions
    return clamp_hooks(values, mode=asked.mode, positions=positions, model=session.model)


def _together(job: Job, streams: dict[str, tuple[Answer | None, Iterator[Any]]]) -> None:
    """Take turns, a token each, until both are at their end."""
    going = dict(streams)
    while going:
        for name in list(going):
            job.check()
            answer, turns = going[name]
            step = next(turns, None)
            if step is None or answer is None:
                del going[name]
                continue
            token, log_probs = step
            answer.ids.append(token["id"])
            answer.told.append(token)
            if name == "steered":
                answer.log_probs.append(log_probs)
            job.tell("tokens", stream=name, tokens=[token])


def _steps(session: Session, stepper: Stepper, log_probs: Tensor, n: int) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The likeliest token each time, up to one that ends the text."""
    ends = _ends(session.model)
    for at in range(n):
        others = session.likeliest(log_probs, SHOWN)
        if others[0]["id"] in ends:
            return
        yield others[0] | {"others": others}, log_probs
        if at < n - 1:
            log_probs = stepper.read(torch.tensor([others[0]["id"]]))[-1].log_softmax(-1)


def _ends(model: Any) -> set[int]:
    """Tokens that end a text, by the tokenizer and by what the model was configured to generate with."""
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ids = [model.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    return {id for one in ids for id in (one if isinstance(one, list) else [one]) if id is not None}


def _prompt(session: Session, prompt: Tensor, log_probs: Tensor) -> list[dict[str, Any]]:
    """The prompt's tokens, each but the first with what was likelier at its place."""
    told = [session.token(int(prompt[0]))]
    for at, id in enumerate(prompt[1:].tolist()):
        own = {"p": float(log_probs[at, id].exp()), "others": session.likeliest(log_probs[at], SHOWN)}
        told.append(session.token(id) | own)
    return told


def _next(session: Session, plain: Tensor, steered: Tensor | None) -> list[dict[str, Any]]:
    """The likeliest first tokens of both, with the probability that each gives them."""
    best = plain if steered is None else torch.maximum(plain, steered)
    ids = best.topk(min(10, len(best))).indices.tolist()
    return [
        session.token(id)
        | {"plain": float(plain[id].exp())}
        | ({} if steered is None else {"steered": float(steered[id].exp())})
        for id in ids
    ]


def _measures(session: Session, prompts: Prompts, plain: Answer, steered: Answer) -> dict[str, Any]:
    """Of both continuations, the perplexity that the model as it is gives them, and how far the clamp moved it.

    `kl` is the mean over the steered continuation's tokens of KL(clamped, unclamped) after the same text, in nats.
    """
    written = [torch.tensor(answer.ids, dtype=torch.long) for answer in (plain, steered)]
    fluency = Fluency.of(session.model, Prompts(prompts.rows * 2), written)
    told = {
        name: {"perplexity": _finite(fluency.perplexity[at]), "distinct": float(fluency.distinct[at])}
        for at, name in enumerate(("plain", "steered"))
    }
    if not steered.ids:
        return told | {"kl": None}
    before = Stepper(session.model).read(torch.cat([prompts.rows[0], written[1][:-1]])).log_softmax(-1)
    after = torch.stack(steered.log_probs)
    kl = (after.exp() * (after - before[-len(after) :])).sum(-1)
    return told | {"kl": _finite(kl.mean())}


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None
