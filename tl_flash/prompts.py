"""Prompts to batches of tokens, and what a model says after each prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

NEUTRAL_PROMPTS = (
    "From my experience,",
    "I think that",
    "One day,",
    "The next thing that I saw was",
    "She looked around and said",
    "He opened the door and found",
    "Let me tell you about",
    "There was a",
    "They talked about",
    "It was about",
    "I would like to",
    "This is the",
    "Yesterday we went to see the",
    "In the morning,",
    "Everyone likes the",
    "My friend has a",
    "We were thinking of",
    "What I want most is",
    "You can see the",
    "The story begins with",
)
"""Twenty beginnings that lead nowhere in particular."""

_LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, each as the model's own `to_tokens` gives it, a beginning-of-sequence token included."""

    rows: tuple[Int[Tensor, " position"], ...]

    @classmethod
    def of(cls, model: Any, prompts: Sequence[str] | Int[Tensor, "prompt position"] | Sequence[Tensor]) -> Prompts:
        """Tokenise prompts.

        Args:
            model: whose tokenizer and n_ctx count.
            prompts: strings, or token ids without padding: one tensor [prompt, position], or several of that shape or
                [position].

        Raises:
            TypeError: they are one string, or neither strings nor token ids.
            ValueError: there are none, one is empty, or one is longer than the model's n_ctx.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts: expected a list of strings, got one string; write [{prompts!r}]")
        parts = [prompts] if torch.is_tensor(prompts) else list(prompts)
        rows = [row.cpu() for part in parts for row in _token_rows(model, part)]
        if not rows or any(len(row) == 0 for row in rows):
            raise ValueError(f"prompts: expected at least one, none of them empty, got {len(rows)}")
        longest = max(map(len, rows))
        if longest > model.cfg.n_ctx:
            raise ValueError(f"prompts: expected at most n_ctx = {model.cfg.n_ctx} tokens, got one of {longest}")
        return cls(tuple(rows))

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Int[Tensor, "prompt position"]]]:
        """Prompts of one length together, so that none is ever padded: their numbers, and their tokens.

        Raises:
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            by_length.setdefault(len(row), []).append(i)
        for group in by_length.values():
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                yield batch, torch.stack([self.rows[i] for i in batch])


def _token_rows(model: Any, part: Any) -> Tensor:
    """Token ids [prompt, position] of one string or tensor."""
    if isinstance(part, str):
        return model.to_tokens(part)
    if not torch.is_tensor(part):
        raise TypeError(f"prompts: expected strings or token ids, got {type(part).__name__}")
    if part.ndim not in (1, 2) or part.is_floating_point():
        raise TypeError(f"prompts: expected token ids [prompt, position], got {part.dtype} {list(part.shape)}")
    return torch.atleast_2d(part)


@dataclass(frozen=True)
class Answers:
    """What a model predicts for the token after each prompt."""

    logits: Float[Tensor, "prompt d_vocab"]
    """Minus their vocabulary mean, so that they do not depend on how the model was loaded."""
    log_probs: Float[Tensor, "prompt d_vocab"]
    nll: Float[Tensor, " prompt"]
    """Mean negative log-probability of the prompt's own tokens in nats; NaN for a prompt of one token."""

    @classmethod
    def of(
        cls,
        model: Any,
        prompts: Prompts,
        batch_size: int | None = None,
        *,
        held: Callable[[list[int]], AbstractContextManager[Any]] = lambda rows: nullcontext(),
    ) -> Answers:
        """Run the model, with whatever hooks it has, on every prompt.

        Args:
            model: which one.
            prompts: each of them.
            batch_size: prompts a forward pass; by default as many as fit 2^26 logits.
            held: the context of a pass, given the numbers of its prompts.
        """
        longest, d_vocab = max(map(len, prompts.rows)), model.W_U.shape[1]
        size = max(1, _LOGITS_AT_ONCE // (longest * d_vocab)) if batch_size is None else batch_size
        last, nll = torch.empty(len(prompts.rows), d_vocab), torch.empty(len(prompts.rows))
        with torch.no_grad():
            for batch, tokens in prompts.batches(size):
                with held(batch):
                    logits = model(tokens.to(model.W_U.device)).float().cpu()
                last[batch] = logits[:, -1]
                log_probs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
                nll[batch] = -log_probs.mean(1)
        return cls(last - last.mean(-1, keepdim=True), last.log_softmax(-1), nll)

    def __getitem__(self, which: slice) -> Answers:
        """The answers to some of the prompts."""
        return Answers(self.logits[which], self.log_probs[which], self.nll[which])

    def ranks(self, token: int) -> Int[Tensor, " prompt"]:
        """How many tokens are likelier than this one, prompt by prompt."""
        return (self.logits > self.logits[:, token, None]).sum(-1)
