"""What clamps do to a model's output, kept as vectors of the normalised residual stream.

The change of a model's log-probabilities, in the mean over positions, is W_U' times the mean change of the normalised
final residual stream, plus a constant; so d_model numbers hold it for the whole vocabulary, and correlations over the
vocabulary need only the covariance of W_U'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps import Mode, Prompts, attached, clamp_rows, run_to
from tl_flash.lens import first_target, folded_unembedding, normalised, vocabulary_covariance
from tl_flash.names import Neuron
from tl_flash.weights import MLPWeights, measuring

_TOKENS_AT_ONCE = 2**12
_EFFECTS_AT_ONCE = 64
_SPLITS = 16


def effects(
    model: Any,
    texts: Prompts,
    clamps: Sequence[tuple[Neuron, float]],
    *,
    mode: Mode = "set",
    batch_size: int | None = None,
) -> Iterator[Float[Tensor, "text d_model"]]:
    """For each clamp alone, at every position but the first: what it changes at a text's positions from 8 on.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        texts: every one is run under every clamp.
        clamps: a neuron and what its hook_post is clamped by.
        mode: as in `clamp`.
        batch_size: rows of a forward pass, a row being a text under one clamp.

    Yields:
        The change of the normalised final residual stream, in the mean over those positions, float64.
    """
    n = len(texts.rows)
    before = _outputs(model, texts, batch_size, lambda rows, length: nullcontext())
    for start in range(0, len(clamps), _EFFECTS_AT_ONCE):
        some = clamps[start : start + _EFFECTS_AT_ONCE]

        def held(rows: list[int], length: int, some: Any = some) -> AbstractContextManager[Any]:
            neurons, values = zip(*(some[row // n] for row in rows), strict=True)
            return clamp_rows(model, neurons, values, mode=mode, positions=range(1, length))

        after = _outputs(model, Prompts(texts.rows * len(some)), batch_size, held)
        yield from after.unflatten(0, (len(some), n)) - before


def _outputs(
    model: Any, texts: Prompts, batch_size: int | None, held: Callable[[list[int], int], AbstractContextManager[Any]]
) -> Float[Tensor, "text d_model"]:
    size = max(1, _TOKENS_AT_ONCE // max(map(len, texts.rows))) if batch_size is None else batch_size
    last, final = len(model.blocks) - 1, []
    outputs = torch.empty(len(texts.rows), model.W_U.shape[0], dtype=torch.float64)
    keep = [(f"blocks.{last}.hook_resid_post", lambda residual, hook: final.append(residual))]
    with measuring(model), attached(model, keep):
        for batch, tokens in texts.batches(size):
            with held(batch, tokens.shape[1]):
                run_to(model, tokens, last)
            residual = final.pop()[:, first_target(tokens.shape[1]) :]
            outputs[batch] = normalised(model, residual).double().mean(1).cpu()
    return outputs


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """W_U', and correlations over the tokens of what it makes of vectors."""

    W_U: Float[Tensor, "d_model d_vocab"]
    covariance: Float[Tensor, "d_model d_model"]

    @classmethod
    def of(cls, weights: MLPWeights) -> Vocabulary:
        """With the final norm's scale folded in."""
        return cls(folded_unembedding(weights), vocabulary_covariance(weights))

    def correlation(self, a: Float[Tensor, "... d_model"], b: Float[Tensor, "... d_model"]) -> Tensor:
        """Of a @ W_U' with b @ W_U' over the vocabulary."""
        a, b = a.double().cpu(), b.double().cpu()
        seen = a @ self.covariance
        squares = (seen * a).sum(-1) * ((b @ self.covariance) * b).sum(-1)
        return (seen * b).sum(-1) / squares.sqrt()

    def ceiling(self, effects: Float[Tensor, "clamp text d_model"]) -> Float[Tensor, " clamp"]:
        """How far anything that does not know the text could correlate with the mean effect over these texts.

        The root of the mean's reliability, which is 2 r / (1 + r) where r is the correlation of the means of two halves
        of the texts (Spearman and Brown, 1910), in the mean over random halves; 0 where that is negative, NaN of one
        text.
        """
        n = effects.shape[1]
        if n == 1:
            return torch.full((len(effects),), torch.nan, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(n, generator=generator) for _ in range(_SPLITS)]
        halves = [(effects[:, order[: n // 2]].mean(1), effects[:, order[n // 2 :]].mean(1)) for order in orders]
        r = torch.stack([self.correlation(*pair) for pair in halves]).mean(0)
        return (2 * r / (1 + r)).clamp(min=0).sqrt()

    def top(self, vectors: Float[Tensor, "n d_model"], k: int) -> Tensor:
        """Ids of the tokens that vectors raise most, [n, k]."""
        parts = vectors.to(self.W_U).split(_EFFECTS_AT_ONCE)
        return torch.cat([(part @ self.W_U).topk(min(k, self.W_U.shape[1])).indices for part in parts]).cpu()
