"""Prompts to batches of tokens, and what a model says after each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    def of(cls, model: Any, prompts: Sequence[str] | Int[Tensor, "prompt position"]) -> Prompts:
        """Tokenise prompts.

        Raises:
            TypeError: they are one string, or neither strings nor token ids.
            ValueError: there are none, one is empty, or one is longer than the model's n_ctx.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts: expected a list of strings, got one string; write [{prompts!r}]")
        if torch.is_tensor(prompts):
            if prompts.ndim != 2 or prompts.is_floating_point():
                raise TypeError(f"prompts: expected token ids [prompt, position], got {list(prompts.shape)}")
            rows = tuple(prompts)
        else:
            for prompt in prompts:
                if not isinstance(prompt, str):
                    raise TypeError(
                        f"prompts: expected strings or one tensor of token ids, got {type(prompt).__name__}"
                    )
            rows = tuple(model.to_tokens(prompt)[0] for prompt in prompts)
        if not rows or any(len(row) == 0 for row in rows):
            raise ValueError(f"prompts: expected at least one, none of them empty, got {len(rows)}")
        longest = max(map(len, rows))
        if longest > model.cfg.n_ctx:
            raise ValueError(f"prompts: expected at most n_ctx = {model.cfg.n_ctx} tokens, got one of {longest}")
        return cls(tuple(row.cpu() for row in rows))

    def batches(self, d_vocab: int, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens [prompt, position] padded on the right, which causal attention never sees, and lengths [prompt]."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        longest = max(map(len, self.rows))
        size = batch_size or max(1, _LOGITS_AT_ONCE // (longest * d_vocab))
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
            yield tokens, torch.tensor([len(row) for row in rows])


@dataclass(frozen=True)
class Answers:
    """What a model predicts for the token after each prompt."""

    logits: Float[Tensor, "prompt d_vocab"]
    """Minus their vocabulary mean, so that they do not depend on how the model was loaded."""
    log_probs: Float[Tensor, "prompt d_vocab"]
    nll: Float[Tensor, " prompt"]
    """Mean negative log-probability of the prompt's own tokens in nats; NaN for a prompt of one token."""

    @classmethod
    def of(cls, model: Any, prompts: Prompts, batch_size: int | None = None) -> Answers:
        """Run the model, with whatever hooks it has, on every prompt."""
        logits, nll = [], []
        device = model.W_U.device
        with torch.no_grad():
            for tokens, lengths in prompts.batches(model.W_U.shape[1], batch_size):
                out = model(tokens.to(device)).float().cpu()
                logits.append(out[torch.arange(len(out)), lengths - 1])
                log_probs = out[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
                real = torch.arange(1, tokens.shape[1])[None] < lengths[:, None]
                nll.append(-(log_probs * real).sum(1) / real.sum(1))
        last = torch.cat(logits)
        return cls(last - last.mean(-1, keepdim=True), last.log_softmax(-1), torch.cat(nll))

    def ranks(self, token: int) -> Int[Tensor, " prompt"]:
        """How many tokens are likelier than this one, prompt by prompt."""
        return (self.logits > self.logits[:, token, None]).sum(-1)
