"""Texts to batches: every batch is drawn from the seed and its step alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedTokenizerFast

from tl_flash.demo.training.corpus import documents
from tl_flash.demo.training.questions import ask, exchanges
from tl_flash.demo.training.recipe import Recipe

IGNORED = -100
Example = tuple[list[int], list[int]]
"""Token ids, and the same with those that carry no loss set to IGNORED."""
Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and labels, both [rows, length]."""


def tokenizer_texts(rng: random.Random, n: int) -> Iterator[str]:
    """What the tokenizer learns from: ``n`` documents and as many questions with answers."""
    asked = (f"{ask(question)} {answer}" for question, answer in exchanges(rng))
    return itertools.chain(itertools.islice(documents(rng), n), itertools.islice(asked, n))


def base_examples(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[Example]:
    """Documents, every token a label."""
    for text in documents(rng):
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        yield ids, ids


def instruct_examples(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[Example]:
    """Questions and answers, the loss on the answer alone; one example in five is a document."""
    texts = base_examples(rng, tokenizer)
    for question, answer in exchanges(rng):
        if rng.random() < 0.2:
            yield next(texts)
            continue
        asked = tokenizer.encode(ask(question))
        said = [*tokenizer.encode(f" {answer}", add_special_tokens=False), tokenizer.eos_token_id]
        yield asked + said, [IGNORED] * len(asked) + said


def pack(examples: Iterator[Example], rows: int, length: int) -> Batch:
    """Fill rows with whole examples, the last of a row cut at its end."""
    inputs = torch.empty(rows, length, dtype=torch.long)
    labels = torch.empty_like(inputs)
    for row in range(rows):
        ids: list[int] = []
        targets: list[int] = []
        while len(ids) < length:
            more_ids, more_targets = next(examples)
            ids += more_ids
            targets += more_targets
        inputs[row], labels[row] = torch.tensor(ids[:length]), torch.tensor(targets[:length])
    return inputs, labels


def batches(
    examples: Callable[[random.Random, PreTrainedTokenizerFast], Iterator[Example]],
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> Callable[[int | str], Batch]:
    """A step's batch from the seed, the stage's name and the step; the validation batch has 64 rows."""

    def batch_at(step: int | str) -> Batch:
        rng = random.Random(f"{recipe.seed}/{name}/{step}")
        return pack(examples(rng, tokenizer), 64 if step == "validation" else recipe.rows, recipe.length)

    return batch_at
