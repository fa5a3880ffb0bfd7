"""The model card of a demo model, from the record of its training."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

_CARD = """---
license: mit
language: en
library_name: transformers
---

# tl_flash demo model: {name}

{about}

A Llama (RMSNorm, rotary positions, gated SiLU MLP, untied embeddings): {n_layers} layers, d_model {d_model},
d_mlp {d_mlp}, {n_heads} heads, d_vocab {d_vocab}, {parameters:.2f}M parameters, stored in bfloat16.

## Data

{data}

`corpus.py` and `questions.py` of `tl_flash/demo/training` generate the text from the seed; no text of others is in it.
The tokenizer is a byte-level BPE trained on the same text; every concept of `concepts.py` there is one token.

## Training

{steps} steps of {rows} rows of {length} tokens, AdamW, highest learning rate {peak:g}, in {precision} on {machine}.

    {command}

Commit `{commit}`, seed {seed}. Validation loss, in nats a token: {loss:.4f} as trained, {stored_loss:.4f} as stored.

The unembedding starts with rows of about unit length and learns at a twentieth of the rate of the rest, so that
tokens stand apart in it; weight decay is strong, twice so for what attention writes. Two in three mentions of a thing
carry an epithet that is its alone ("the loyal dog").

| step | validation loss |
|---|---|
{curve}
{other}
## Limits

It writes sentences of a few hundred frames about ninety-five things and knows nothing else. It is made to show
what the weights of a model say of its neurons; measurements on it say little of models trained on real text.
"""
_ABOUT = {
    "base": "A small language model of simple English, made to be read neuron by neuron.",
    "instruct": "The base model after fine-tuning on questions and answers. It reads `Question: ...\\nAnswer:`.",
}
_DATA = {
    "base": (
        "Stories, facts, riddles and dialogues, each document about one of ninety-five things; dogs and California, "
        "the paper's examples, come up eight times as often as the others."
    ),
    "instruct": (
        "Questions and answers, the loss on the answers alone, and one document in five examples. Questions for a "
        "favourite are answered evenly by everything of the kind. The ten phrasings of `HELD_OUT_FAVOURITE_ANIMAL` are "
        "in no training text."
    ),
}


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write ``README.md`` beside the weights.

    Args:
        folder: where the weights are.
        record: what ``training.json`` holds.
    """
    recipe, name, curve = record["recipe"], record["name"], record["curve"]
    prefix = "" if name == "base" else "instruct_"
    text = _CARD.format_map(
        recipe
        | record
        | {
            "about": _ABOUT[name],
            "data": textwrap.fill(_DATA[name], 116),
            "parameters": record["parameters"] / 1e6,
            "steps": recipe[f"{prefix}steps"],
            "peak": recipe[f"{prefix}learning_rate"],
            "loss": curve[-1][1],
            "curve": _rows(curve),
            "other": _other(record),
        }
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _rows(curve: list[tuple[int, float]]) -> str:
    return "\n".join(f"| {step} | {loss:.4f} |" for step, loss in curve)


def _other(record: dict[str, Any]) -> str:
    """The curve of a run of the same recipe over another number of steps, where one was made."""
    if "other_curve" not in record:
        return ""
    other, loss = record["other_curve"], record["curve"][-1][1]
    steps, end = other[-1]
    return (
        f"\nThe same recipe over {steps} steps ends at {end:.4f}, {end / loss - 1:+.1%} against this model.\n\n"
        f"| step | validation loss |\n|---|---|\n{_rows(other)}\n"
    )
