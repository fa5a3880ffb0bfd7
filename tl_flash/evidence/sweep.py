"""Dose curves: tokens' probabilities as one neuron is clamped to rising values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_flash.clamps import Answers, Positions, Prompts, PromptsLike, answers_alone, require_hooks
from tl_flash.evidence.asked import asked_tokens
from tl_flash.names import Neuron, NeuronLike
from tl_flash.progress import track

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class DoseCurve:
    """Tokens' probabilities after each prompt as one neuron is clamped to rising values."""

    neuron: Neuron
    values: Float[Tensor, " value"]
    """Of hook_post."""
    tokens: tuple[str, ...]
    prob: Float[Tensor, "value prompt token"]
    logit: Float[Tensor, "value prompt token"]
    """Minus the mean over the vocabulary."""
    rank: Int[Tensor, "value prompt token"]
    """How many tokens are likelier."""
    unclamped_prob: Float[Tensor, "prompt token"]
    unclamped_logit: Float[Tensor, "prompt token"]
    unclamped_rank: Int[Tensor, "prompt token"]

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a value and token, value NaN for the unclamped model.

        `prob` and `logit` are means over the prompts, `rank` is the median.
        `prob_low` and `prob_high` bound the mean probability: mean -+ 1.96 standard errors over the prompts, within
        0 to 1.
        """
        import pandas as pd

        values = [float("nan"), *self.values.tolist()]
        prob = torch.cat([self.unclamped_prob[None], self.prob])
        logit = torch.cat([self.unclamped_logit[None], self.logit])
        rank = torch.cat([self.unclamped_rank[None], self.rank]).double()
        low, high = (bound.clamp(0, 1) for bound in _interval(prob, dim=1))
        rows = [
            {
                "neuron": str(self.neuron),
                "value": value,
                "token": token,
                "prob": float(prob[i, :, j].mean()),
                "prob_low": float(low[i, j]),
                "prob_high": float(high[i, j]),
                "logit": float(logit[i, :, j].mean()),
                "rank": float(rank[i, :, j].median()),
            }
            for i, value in enumerate(values)
            for j, token in enumerate(self.tokens)
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        frame = self.to_frame().assign(token=lambda frame: frame["token"].map(repr))
        frame["value"] = ["unclamped" if value != value else f"{value:.3g}" for value in frame["value"]]
        return frame.to_string(index=False, float_format="{:.3g}".format)

    def __repr__(self) -> str:
        return str(self)


def clamp_sweep(
    model: Any,
    neuron: NeuronLike,
    values: Sequence[float],
    prompts: PromptsLike,
    tokens: Sequence[str | int],
    *,
    chat: bool = False,
    positions: Positions = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> DoseCurve:
    """Clamp one neuron to rising values and read tokens' probabilities after each prompt.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        neuron: which one.
        values: of hook_post, in any order. `activation_stats` gives the neuron's own units.
        prompts: texts, token ids or conversations, as `Prompts.of` takes them.
        tokens: strings or ids to follow.
        chat: each text is what a user says, in the tokenizer's chat template.
        positions: as in `clamp`; prompts of one length share a pass, so that none is padded.
        batch_size: rows a forward pass, a row being a prompt under one value; by default as many as fit 2^26 logits.
        progress: a bar; by default on a terminal or in a notebook.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no values, prompts or tokens, an unknown token, or what `clamp` refuses.

    Example:
        >>> clamp_sweep(model, "L1N3", [0.0, 4.0], ["One day,"], [5]).prob.shape
        torch.Size([2, 1, 1])
    """
    if len(values) == 0:
        raise ValueError("values: expected at least one value to clamp to, got none")
    require_hooks(model)
    named = asked_tokens(model, tokens)
    ids = list(named)
    neuron, texts = Neuron.of(neuron), Prompts.of(model, prompts, chat=chat)
    before = Answers.of(model, texts, batch_size)
    doses = [(neuron, float(value) + 0.0) for value in values]  # -0.0 + 0.0 is 0.0
    clamped = answers_alone(model, texts, doses, positions=positions, batch_size=batch_size)
    read = [
        (answer.log_probs[:, ids].exp(), answer.logits[:, ids], _ranks(answer, ids))
        for answer in track(clamped, f"clamping {neuron}", progress, total=len(doses))
    ]
    prob, logit, rank = (torch.stack(part) for part in zip(*read, strict=True))
    return DoseCurve(
        neuron=neuron,
        values=torch.tensor([value for _, value in doses], dtype=torch.float32),
        tokens=tuple(named.values()),
        prob=prob,
        logit=logit,
        rank=rank,
        unclamped_prob=before.log_probs[:, ids].exp(),
        unclamped_logit=before.logits[:, ids],
        unclamped_rank=_ranks(before, ids),
    )


def _ranks(answers: Answers, ids: list[int]) -> Int[Tensor, "prompt token"]:
    return torch.stack([answers.ranks(id) for id in ids], dim=-1)


def _interval(samples: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean -+ 1.96 standard errors; of one sample, the sample."""
    n = samples.shape[dim]
    error = samples.std(dim) / n**0.5 if n > 1 else torch.zeros_like(samples.mean(dim))
    return samples.mean(dim) - 1.96 * error, samples.mean(dim) + 1.96 * error
