"""Prompts to batches of tokens, and what a model says after each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
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
