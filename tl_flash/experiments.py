"""Test labels causally: dose curves, validation against matched controls, what a clamped model talks of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_flash.alone import answers_alone
from tl_flash.clamp import Positions, clamp
from tl_flash.neurons import Neuron, NeuronLike
from tl_flash.progress import track
from tl_flash.prompts import Answers, Prompts
from tl_flash.vocab import Vocab

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
        """A pandas frame, a row a value and token, value NaN for the unclamped model; means over prompts.

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
    prompts: Sequence[str] | Tensor,
    tokens: Sequence[str | int],
    *,
    positions: Positions = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> DoseCurve:
    """Clamp one neuron to rising values and read tokens' probabilities after each prompt.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        neuron: which one.
        values: of hook_post, in any order. `activation_stats` gives the neuron's own units.
        prompts: strings, or token ids [prompt, position].
        tokens: strings or ids to follow.
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
    ids, names = _tokens(model, tokens)
    neuron, texts = Neuron.of(neuron), Prompts.of(model, prompts)
    before = Answers.of(model, texts, batch_size)
    doses = [(neuron, float(value)) for value in values]
    clamped = answers_alone(model, texts, doses, positions=positions, batch_size=batch_size)
    read = [
        (answer.log_probs[:, ids].exp(), answer.logits[:, ids], _ranks(answer, ids))
        for answer in track(clamped, f"clamping {neuron}", progress, total=len(doses))
    ]
    prob, logit, rank = (torch.stack(part) for part in zip(*read, strict=True))
    return DoseCurve(
        neuron=neuron,
        values=torch.tensor([float(value) for value in values]),
        tokens=names,
        prob=prob,
        logit=logit,
        rank=rank,
        unclamped_prob=before.log_probs[:, ids].exp(),
        unclamped_logit=before.logits[:, ids],
        unclamped_rank=_ranks(before, ids),
    )


@dataclass(frozen=True)
class MentionRate:
    """How many completions speak of a word, before and after a clamp."""

    word: str
    prompts: tuple[str, ...]
    completions_before: tuple[str, ...]
    completions_after: tuple[str, ...]
    mentions_before: tuple[bool, ...]
    mentions_after: tuple[bool, ...]

    @property
    def before(self) -> float:
        """Share of the unclamped completions that speak of the word."""
        return sum(self.mentions_before) / len(self.prompts)

    @property
    def after(self) -> float:
        """Share of the clamped completions that speak of the word."""
        return sum(self.mentions_after) / len(self.prompts)

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a prompt."""
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": self.prompts,
                "before": self.completions_before,
                "after": self.completions_after,
                "mentions_before": self.mentions_before,
                "mentions_after": self.mentions_after,
            }
        )

    def __str__(self) -> str:
        n = len(self.prompts)
        lines = [f"{self.word!r} in {sum(self.mentions_before)} of {n} before, {sum(self.mentions_after)} of {n} after"]
        for prompt, before, after in zip(self.prompts, self.completions_before, self.completions_after, strict=True):
            lines += [f"{prompt!r}", f"  before: {before.strip()}", f"  after:  {after.strip()}"]
        return "\n".join(lines)


def mention_rate(
    model: Any,
    prompts: Sequence[str],
    word: str,
    neurons: Mapping[NeuronLike, float | Tensor],
    *,
    max_new_tokens: int = 24,
    positions: Positions = None,
    mode: str = "set",
    do_sample: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> MentionRate:
    """Let a model complete prompts with and without a clamp, and count who speaks of a word.

    A completion speaks of the word where it `mentions` it; the prompt does not count.

    Args:
        model: a HookedTransformer or a TransformerBridge with a tokenizer.
        prompts: texts to complete, one at a time.
        word: such as "dog".
        neurons: a value for each neuron, as `clamp` takes them.
        max_new_tokens: length of a completion at most.
        positions: as in `clamp`.
        mode: as in `clamp`.
        do_sample: draw tokens instead of taking the likeliest.
        seed: of the draws, the same before and after.
        progress: a bar; by default on a terminal or in a notebook.

    Raises:
        TypeError: `prompts` is one string.
        ValueError: no prompts, an empty word, or what `clamp` refuses.

    Example:
        >>> rate = mention_rate(model, ["My favourite animal is"], "dog", {"L1N3": 2.0}, max_new_tokens=3)
        >>> rate.before in (0.0, 1.0)
        True
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a list of strings, got one string; write [{prompts!r}]")
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one, got none")
    if not word.strip():
        raise ValueError(f"word: expected a word, got {word!r}")

    def complete(prompt: str) -> str:
        return complete_text(model, prompt, max_new_tokens, do_sample=do_sample, seed=seed)

    before = tuple(complete(prompt) for prompt in track(prompts, "unclamped", progress))
    with clamp(model, neurons, mode=mode, positions=positions):  # pyright: ignore[reportArgumentType]
        after = tuple(complete(prompt) for prompt in track(prompts, "clamped", progress))
    return MentionRate(
        word=word.strip(),
        prompts=tuple(prompts),
        completions_before=before,
        completions_after=after,
        mentions_before=tuple(mentions(text, word) for text in before),
        mentions_after=tuple(mentions(text, word) for text in after),
    )


def mentions(text: str, word: str) -> bool:
    """Whether a text holds a word, or its plural in -s, as a word of its own, in any case.

    Example:
        >>> from tl_flash.experiments import mentions
        >>> mentions("Dogs are fun.", "dog"), mentions("A hotdog.", "dog")
        (True, False)
    """
    return re.search(rf"\b{re.escape(word.strip())}s?\b", text, re.IGNORECASE) is not None


def complete_text(model: Any, prompt: str, max_new_tokens: int = 24, *, do_sample: bool = False, seed: int = 0) -> str:
    """What a model generates after a prompt, without the prompt and special tokens.

    Raises:
        ValueError: the model has no tokenizer.
    """
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("model: it has no tokenizer, so it cannot complete text")
    tokens = model.to_tokens(prompt)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(
            tokens, max_new_tokens=max_new_tokens, do_sample=do_sample, verbose=False, return_type="tokens"
        )
    return model.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


def _tokens(model: Any, tokens: Sequence[str | int]) -> tuple[list[int], tuple[str, ...]]:
    vocab = Vocab.of_tokenizer(getattr(model, "tokenizer", None), model.W_U.shape[1])
    ids = vocab.ids(tokens)
    if not ids:
        raise ValueError("tokens: expected at least one token to follow, got none")
    return ids, tuple(vocab.string(id) for id in ids)


def _ranks(answers: Answers, ids: list[int]) -> Int[Tensor, "prompt token"]:
    return torch.stack([answers.ranks(id) for id in ids], dim=-1)


def _interval(samples: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean -+ 1.96 standard errors; of one sample, the sample."""
    n = samples.shape[dim]
    error = samples.std(dim) / n**0.5 if n > 1 else torch.zeros_like(samples.mean(dim))
    return samples.mean(dim) - 1.96 * error, samples.mean(dim) + 1.96 * error
