"""Train the demo pair: ``python -m tl_flash.demo.training``.

A tokenizer, a base model on the corpus, then an instruct model fine-tuned from it on questions and answers. Every
batch is drawn from the seed and its step alone, so a run that was stopped goes on from its last checkpoint to the
result that it would have had.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tl_flash.demo.training.batches import Batch, base_examples, batches, instruct_examples, tokenizer_texts
from tl_flash.demo.training.card import write_card
from tl_flash.demo.training.fit import fit, validation_loss
from tl_flash.demo.training.recipe import Recipe
from tl_flash.demo.training.tokenizer import BOS, EOS, train_tokenizer


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
    named = (
        folder / "tokenizer_config.json"
    )  # transformers 5 writes a class name that 4 does not know; both know this one
    config = json.loads(named.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    named.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    record["parameters"] = stored.num_parameters()
    record["stored_loss"] = validation_loss(stored.float(), held_out)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
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
            record["other_curve"] = json.loads(beside.read_text(encoding="utf-8"))["curve"]
        save(model, tokenizer, out / name, batch_at("validation"), record)


def _provenance() -> dict[str, str]:
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python -m tl_flash.demo.training", *_without_paths(sys.argv[1:])]),
        "commit": git.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }


def _without_paths(arguments: list[str]) -> list[str]:
    """The arguments but those that only say where files are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--out", "--beside"):
        parser.add_argument(flag)
    return parser.parse_known_args(arguments)[1]
