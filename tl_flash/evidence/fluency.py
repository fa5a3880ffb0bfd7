"""Does a text still read? How likely a model finds what it wrote, and how often it repeats itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_flash.clamps import Prompts, reads_its_cache, require_room
from tl_flash.weights import measuring

_ROWS = 16
"""Prompts that are completed, or read, at a time."""


@dataclass(frozen=True, eq=False)
class Fluency:
    """How a model's continuations of some prompts read."""

    perplexity: Float[Tensor, " prompt"]
    """Of the continuation's tokens after the prompt, by the model as it is when asked; NaN for an empty one."""
    distinct: Float[Tensor, " prompt"]
    """Share of the continuation's bigrams that are not repeated; 1 where it has none."""

    @classmethod
    def of(cls, model: Any, prompts: Prompts, written: list[Int[Tensor, " token"]]) -> Fluency:
        """Read continuations.

        Args:
            model: by whose probabilities; it runs with whatever hooks it has.
            prompts: what was continued.
            written: the continuations, as `continuations` gives them.
        """
        some = [row for row, tokens in enumerate(written) if len(tokens)]
        whole = Prompts(tuple(torch.cat([prompts.rows[row], written[row]]) for row in some))
        nats = torch.full((len(written),), torch.nan)
        with measuring(model):
            for batch, tokens in whole.batches(_ROWS):
                log_probs = model(tokens[:, :-1].to(model.W_U.device)).float().log_softmax(-1).cpu()
                own = log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
                for at, row in enumerate(some[each] for each in batch):
                    nats[row] = -own[at, -len(written[row]) :].mean()
        return cls(nats.exp(), torch.tensor([_distinct(row.tolist()) for row in written]))


def continuations(
    model: Any,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    held: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Int[Tensor, " token"]]:
    """What a model writes after prompts, the likeliest token each time, up to its end-of-sequence token.

    Args:
        model: a HookedTransformer or a TransformerBridge with a tokenizer.
        prompts: those of one length are continued together.
        max_new_tokens: at most.
        held: makes the clamp to hold meanwhile, one for each batch: a clamp follows one sequence.
    """
    require_room(model, prompts, max_new_tokens)
    written: dict[int, Tensor] = {}
    cached = reads_its_cache(model)
    with measuring(model):
        for batch, tokens in prompts.batches(_ROWS):
            with held():
                out = model.generate(
                    tokens.to(model.W_U.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_past_kv_cache=cached,
                    verbose=False,
                    return_type="tokens",
                )
            written |= dict(zip(batch, out[:, tokens.shape[1] :].cpu(), strict=True))
    end = model.tokenizer.eos_token_id
    return [_until(written[row], end) for row in range(len(prompts.rows))]


def _until(tokens: Tensor, end: int | None) -> Tensor:
    found = (tokens == end).nonzero()[:, 0] if end is not None else tokens[:0]
    return tokens[: int(found[0])] if len(found) else tokens


def _distinct(tokens: list[int]) -> float:
    bigrams = list(zip(tokens, tokens[1:], strict=False))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0
