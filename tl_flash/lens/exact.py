"""The exact mean Jacobian, by one backward sweep for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps import Prompts
from tl_flash.lens.lens import JacobianLens, LensSource, signature
from tl_flash.progress import track
from tl_flash.weights import MLPWeights, chosen_layers, read

_ROWS = 16
"""Rows of J that one backward pass gives."""


def jacobian_lens(
    model: Any,
    prompts: Sequence[str] | Tensor,
    *,
    layers: Sequence[int] | None = None,
    positions: str = "all",
    batch_size: int = 8,
    progress: bool | None = None,
) -> JacobianLens:
    """The mean over prompts of d ln_final(resid)[last] / d hook_resid_post, of all layers from one backward sweep.

    The logit lens reads the residual stream as if no layer followed; the mean Jacobian carries it through those that
    do, to first order. Related are the tuned lens (Belrose et al. 2023, arXiv 2303.08112), which trains an affine map
    a layer, and causal Jacobian lenses of single directions.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        prompts: strings, or token ids [prompt, position]; text like the text that effects are wanted for.
        layers: which layers; all by default.
        positions: "all" adds the change at every position of the prompt, "same" at its last one alone.
        batch_size: prompts a forward pass.
        progress: a bar; by default on a terminal or in a notebook.

    Raises:
        TypeError: no such model, or prompts of another kind.
        ValueError: no prompts or too long ones, unknown layers or positions, weights without gradients.

    Example:
        >>> lens = jacobian_lens(model, ["One day,", "The cat"])
        >>> lens.J.shape == (model.cfg.n_layers, model.cfg.d_model, model.cfg.d_model)
        True
    """
    weights = read(model)
    chosen = chosen_layers(layers, weights.n_layers)
    if positions not in ("all", "same"):
        raise ValueError(f'positions: expected "all" or "same", got {positions!r}')
    texts = Prompts.of(model, prompts)
    shape = (len(chosen), weights.d_model, weights.d_model)
    total, squares = torch.zeros(2, *shape, dtype=torch.float64)
    for _, tokens in track(list(texts.batches(batch_size)), "Jacobian", progress):
        for rows, jacobian in _rows(model, weights, tokens, chosen, positions == "same"):
            total[:, rows] += jacobian.sum(2).double().cpu()
            squares[:, rows] += jacobian.square().sum(2).double().cpu()
    n = len(texts.rows)
    mean = total / n
    variance = (squares / n - mean.square()).clamp(min=0) * n / (n - 1) if n > 1 else torch.full_like(mean, torch.nan)
    return JacobianLens(
        J=mean.float(),
        stderr=(variance / n).sqrt().float(),
        layers=tuple(chosen),
        source=LensSource(
            model=weights.name,
            dtype=weights.dtype,
            positions=positions,
            prompts=n,
            tokens=sum(map(len, texts.rows)),
        ),
        signature=signature(weights),
    )


def _rows(
    model: Any, weights: MLPWeights, tokens: Tensor, layers: list[int], same: bool
) -> Iterator[tuple[slice, Float[Tensor, "layer row prompt d_model"]]]:
    """Rows of each prompt's Jacobians, for all layers at once; the forward pass runs once."""
    device = weights.W_U.device
    last = weights.n_layers - 1
    where = (torch.arange(tokens.shape[1], device=device) == tokens.shape[1] - 1)[:, None]
    deltas = {
        layer: torch.zeros(len(tokens), 1, weights.d_model, device=device, requires_grad=True) for layer in layers
    }
    final: list[Tensor] = []

    def add(residual: Tensor, hook: Any, layer: int) -> Tensor:
        if layer in deltas:
            delta = deltas[layer].to(residual.dtype)
            residual = residual + (delta * where if same else delta)
        if layer == last:
            final.append(residual)
        return residual

    hooks = [
        (f"blocks.{layer}.hook_resid_post", lambda residual, hook, layer=layer: add(residual, hook, layer))
        for layer in sorted({*layers, last})
    ]
    with torch.enable_grad():
        model.run_with_hooks(tokens.to(device), fwd_hooks=hooks)
        output = _unit(final[-1][:, -1].float(), weights.centre, model.cfg.eps)
    inputs = [deltas[layer] for layer in layers]
    for start in range(0, weights.d_model, _ROWS):
        rows = slice(start, min(start + _ROWS, weights.d_model))
        seeds = torch.zeros(rows.stop - start, *output.shape, device=device)
        seeds[torch.arange(rows.stop - start), :, torch.arange(start, rows.stop)] = 1
        grads = torch.autograd.grad(output, inputs, seeds, retain_graph=True, is_grads_batched=True)
        yield rows, torch.stack([grad[:, :, 0] for grad in grads])


def _unit(residual: Float[Tensor, "prompt d_model"], centre: bool, eps: float) -> Float[Tensor, "prompt d_model"]:
    """The final norm without its scale."""
    if centre:
        residual = residual - residual.mean(-1, keepdim=True)
    return residual / (residual.square().mean(-1, keepdim=True) + eps).sqrt()
