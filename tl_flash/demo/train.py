"""Train the demo pair: ``python -m tl_flash.demo.train``.

A tokenizer, a base model on the corpus, then an instruct model fine-tuned from it on questions and answers. Every
batch is drawn from the seed and its step alone, so a run that was stopped goes on from its last checkpoint to the
result that it would have had.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tl_flash.demo.card import write_card
from tl_flash.demo.corpus import documents
from tl_flash.demo.questions import ask, exchanges
from tl_flash.demo.tokenizer import BOS, EOS, train_tokenizer

IGNORED = -100

Example = tuple[list[int], list[int]]
"""Token ids, and the same with those that carry no loss set to IGNORED."""

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and labels, both [rows, length]."""


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, apart from the machine."""

    seed: int = 0
    d_vocab: int = 2560
    d_model: int = 160
    d_mlp: int = 1024
    n_layers: int = 4
    n_heads: int = 5
    length: int = 128
    rows: int = 8
    steps: int = 10400
    learning_rate: float = 3e-3
    instruct_steps: int = 600
    instruct_learning_rate: float = 5e-4
    weight_decay: float = 0.5
    warmup: int = 100
    tokenizer_documents: int = 10_000


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


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean next-token cross-entropy in nats."""
    inputs, labels = (part.to(model.device) for part in batch)
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, batch: Batch) -> float:
    """Loss on a batch, in evaluation mode and full precision."""
    return loss_of(model.eval(), batch).item()


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to the peak, then a cosine to a twentieth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2)


def _optimizer(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; the unembedding learns slowly and keeps near its start, where tokens stand apart."""
    head = [model.lm_head.weight]
    gains = [p for p in model.parameters() if p.ndim == 1]
    mixing = [p for name, p in model.named_parameters() if "v_proj" in name or "o_proj" in name]
    apart = {id(p) for p in head + gains + mixing}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in apart], "weight_decay": weight_decay, "scale": 1.0},
        {"params": mixing, "weight_decay": 2 * weight_decay, "scale": 1.0},
        {"params": gains, "weight_decay": 0.0, "scale": 1.0},
        {"params": head, "weight_decay": 0.0, "scale": 0.05, "eps": 1e-5},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def fit(
    model: LlamaForCausalLM,
    batch_at: Callable[[int | str], Batch],
    checkpoint: Path,
    *,
    steps: int,
    peak: float,
    recipe: Recipe,
    bf16: bool = False,
    stop_at: int | None = None,
) -> list[tuple[int, float]]:
    """Train in place, from the checkpoint if there is one.

    Args:
        model: the model to train.
        batch_at: a step's batch; ``"validation"`` gives the one held out.
        checkpoint: file to resume from, and to write at every point of the curve.
        steps: length of the run, and of its learning-rate schedule.
        peak: highest learning rate.
        recipe: warm-up and weight decay.
        bf16: run the forward pass under bf16 autocast.
        stop_at: stop before this step, to be resumed.

    Returns:
        Steps and their validation losses, twenty-one over a whole run.
    """
    optimizer, held_out = _optimizer(model, recipe.weight_decay), batch_at("validation")
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=model.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        curve = saved["curve"]
    else:
        curve = [(0, validation_loss(model, held_out))]
    every, end = max(1, steps // 20), min(steps, stop_at or steps)
    bar = tqdm(range(curve[-1][0], end), desc=checkpoint.stem, initial=curve[-1][0], total=steps)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(step, steps, peak, recipe.warmup)
        model.train()
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(model, batch_at(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == end:
            curve.append((step + 1, validation_loss(model, held_out)))
            bar.set_postfix(validation=f"{curve[-1][1]:.4f}")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
            torch.save(state, checkpoint)
    return curve


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


def new_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train the recipe's tokenizer."""
    texts = tokenizer_texts(random.Random(f"{recipe.seed}/tokenizer"), recipe.tokenizer_documents)
    return train_tokenizer(texts, recipe.d_vocab)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model, the rows of its unembedding at about unit length."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.d_vocab,
            hidden_size=recipe.d_model,
            intermediate_size=recipe.d_mlp,
            num_hidden_layers=recipe.n_layers,
            num_attention_heads=recipe.n_heads,
            num_key_value_heads=recipe.n_heads,
            max_position_embeddings=2 * recipe.length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.get_vocab()[BOS],
            eos_token_id=tokenizer.get_vocab()[EOS],
        )
    )
    torch.nn.init.normal_(model.lm_head.weight, std=recipe.d_model**-0.5)
    return model


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, held_out: Batch, record: dict[str, Any]
) -> None:
    """Write weights in bf16, tokenizer, ``training.json`` and the model card."""
    stored = LlamaForCausalLM(model.config).bfloat16()
    stored.load_state_dict(model.state_dict())
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record["parameters"] = stored.num_parameters()
    record["stored_loss"] = validation_loss(stored.float(), held_out)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    write_card(folder, record)


def train(
    out: Path,
    recipe: Recipe,
    *,
    base_only: bool = False,
    device: str = "cpu",
    bf16: bool = False,
    stop_at: int | None = None,
    beside: Path | None = None,
) -> None:
    """Make the pair: ``out/base`` and ``out/instruct``, with checkpoints beside them.

    Args:
        out: folder to write to, and to resume from.
        recipe: what to train.
        base_only: leave out the instruct model.
        device: where to train.
        bf16: run the forward passes under bf16 autocast.
        stop_at: stop each stage before this step and write no weights; the next call goes on from there.
        beside: ``training.json`` of a base run of other length, whose curve the card shows beside this one's.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = new_tokenizer(recipe)
    model = new_model(recipe, tokenizer)
    torch.nn.Module.to(model, device)
    stages = [("base", base_examples, recipe.steps, recipe.learning_rate)]
    if not base_only:
        stages.append(("instruct", instruct_examples, recipe.instruct_steps, recipe.instruct_learning_rate))
    for name, examples, steps, peak in stages:
        batch_at, checkpoint = batches(examples, name, tokenizer, recipe), out / f"{name}.pt"
        curve = fit(model, batch_at, checkpoint, steps=steps, peak=peak, recipe=recipe, bf16=bf16, stop_at=stop_at)
        if curve[-1][0] < steps:
            return
        precision = "bfloat16 autocast" if bf16 else "float32"
        record = {"name": name, "recipe": asdict(recipe), "precision": precision, **_provenance(), "curve": curve}
        if beside and name == "base":
            record["other_curve"] = json.loads(beside.read_text())["curve"]
        save(model, tokenizer, out / name, batch_at("validation"), record)


def _provenance() -> dict[str, str]:
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python -m tl_flash.demo.train", *_without_paths(sys.argv[1:])]),
        "commit": git.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }


def _without_paths(arguments: list[str]) -> list[str]:
    """The arguments but those that only say where files are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--out", "--beside"):
        parser.add_argument(flag)
    return parser.parse_known_args(arguments)[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tl_flash.demo.train", description=(__doc__ or "").partition(".")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder to write to and resume from")
    parser.add_argument("--base-only", action="store_true", help="leave out the instruct model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast; slow on a CPU without AVX512-BF16")
    parser.add_argument("--stop-at", type=int, help="stop each stage before this step, to be resumed")
    parser.add_argument("--beside", type=Path, help="training.json of a base run of other length, for the card")
    for field in fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    args = vars(parser.parse_args(argv))
    recipe = Recipe(**{field.name: args.pop(field.name) for field in fields(Recipe)})
    train(args.pop("out"), recipe, **args)


if __name__ == "__main__":
    main()
