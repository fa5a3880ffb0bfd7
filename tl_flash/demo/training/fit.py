"""Train a model in place, from its last checkpoint on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM

from tl_flash.demo.training.batches import IGNORED, Batch
from tl_flash.demo.training.recipe import Recipe


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
