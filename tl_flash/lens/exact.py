"""The exact mean Jacobian, by backward passes through the whole model, one sweep for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps import Prompts, attached, run_to
from tl_flash.lens.estimate import Estimate, OverTexts
from tl_flash.lens.passages import has_hook
from tl_flash.lens.targets import first_target, normalised
from tl_flash.progress import track
from tl_flash.weights import differentiating

_ROWS = 16
"""Rows of J that one backward pass gives."""


def exact(
    model: Any,
    texts: Prompts,
    layers: Sequence[int],
    *,
    freeze_attention: bool = True,
    max_error: float | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Estimate:
    """The mean over texts, and its standard error from their spread; as many texts as `max_error` needs."""
    d_model = model.W_U.shape[0]
    sums = OverTexts(len(layers), d_model)
    batches = list(texts.batches(batch_size))
    steps = ((tokens, *step) for _, tokens in batches for step in _rows(model, tokens, layers, freeze_attention))
    n_tokens = 0
    total = len(batches) * -(-d_model // _ROWS)
    for tokens, rows, jacobian in track(steps, "exact lens", progress, total=total):
        sums.add(slice(len(layers)), rows, jacobian)
        if rows.stop == d_model:
            sums.texts += len(tokens)
            n_tokens += tokens.numel()
            if max_error is not None and sums.error() <= max_error:
                break
    return Estimate(sums.mean().float(), sums.stderr().float(), sums.texts, n_tokens)


def _rows(
    model: Any, tokens: Tensor, layers: Sequence[int], freeze_attention: bool
) -> Iterator[tuple[slice, Float[Tensor, "text layer row d_model"]]]:
    """Rows of each text's Jacobians, for all layers at once; the forward pass runs once.

    A text has one change a layer, alike at every position but the first, and the mean output of its targets.
    """
    device, d_model = model.W_U.device, model.W_U.shape[0]
    n_texts, length = tokens.shape
    moves = (torch.arange(length, device=device) > 0)[:, None]
    deltas = {layer: torch.zeros(n_texts, 1, d_model, device=device, requires_grad=True) for layer in layers}
    final: list[Tensor] = []
    last = len(model.blocks) - 1

    def add(residual: Tensor, hook: Any, layer: int) -> Tensor:
        if layer in deltas:
            residual = residual + deltas[layer].to(residual.dtype) * moves
        if layer == last:
            final.append(residual)
        return residual

    names = {layer: f"blocks.{layer}.hook_resid_post" for layer in sorted({*layers, last})}
    hooks: list[Any] = [
        (name, lambda residual, hook, layer=layer: add(residual, hook, layer)) for layer, name in names.items()
    ]
    if freeze_attention:
        patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(min(layers) + 1, last + 1)]
        hooks += [(name, lambda pattern, hook: pattern.detach()) for name in patterns if has_hook(model, name)]
    with ExitStack() as stack, differentiating(model):
        stack.enter_context(attached(model, hooks))
        run_to(model, tokens, last)
        output = normalised(model, final[-1][:, first_target(length) :]).mean(1)
    inputs = [deltas[layer] for layer in layers]
    for start in range(0, d_model, _ROWS):
        rows = slice(start, min(start + _ROWS, d_model))
        seeds = torch.zeros(rows.stop - start, *output.shape, device=device, dtype=output.dtype)
        seeds[torch.arange(rows.stop - start), :, torch.arange(start, rows.stop)] = 1
        grads = torch.autograd.grad(output, inputs, seeds, retain_graph=True, is_grads_batched=True)
        yield rows, torch.stack([grad[:, :, 0] for grad in grads]).movedim(2, 0)
