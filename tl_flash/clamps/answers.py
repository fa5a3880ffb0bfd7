"""What a model says after each prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_flash.clamps.prompts import Prompts
from tl_flash.vocab import writes_what_it_reads
from tl_flash.weights import measuring

_LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Answers:
    """What a model predicts for the token after each prompt."""

    logits: Float[Tensor, "prompt d_vocab"]
    """Minus their vocabulary mean, so that they do not depend on how the model was loaded."""
    log_probs: Float[Tensor, "prompt d_vocab"]
    nll: Float[Tensor, " prompt"]
    """Mean negative log-probability of the prompt's own tokens in nats; NaN for a prompt of one token, or of a model
    that predicts classes of its own."""

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
        n = len(prompts.rows)
        last, nll = torch.empty(n, d_vocab, dtype=torch.float32), torch.full((n,), torch.nan, dtype=torch.float32)
        with measuring(model):
            for batch, tokens in prompts.batches(size):
                with held(batch):
                    logits = model(tokens.to(model.W_U.device)).float().cpu()
                last[batch] = logits[:, -1]
                if writes_what_it_reads(model):
                    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
                    nll[batch] = -log_probs.mean(1)
        return cls(last - last.mean(-1, keepdim=True), last.log_softmax(-1), nll)

    def __getitem__(self, which: slice) -> Answers:
        """The answers to some of the prompts."""
        return Answers(self.logits[which], self.log_probs[which], self.nll[which])

    def ranks(self, token: int) -> Int[Tensor, " prompt"]:
        """How many tokens are likelier than this one, prompt by prompt."""
        return (self.logits > self.logits[:, token, None]).sum(-1)
