"""The mean Jacobian from each layer's residual stream to the output: what is written early, as the output sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash import models
from tl_flash.progress import track
from tl_flash.prompts import Prompts
from tl_flash.weights import MLPWeights, fingerprint

FORMAT = "tl_flash.JacobianLens"
VERSION = 1
_ROWS = 16
"""Rows of J that one backward pass gives."""
_SAMPLES = 64


@dataclass(frozen=True)
class LensSource:
    """Where a lens comes from."""

    model: str
    dtype: str
    positions: str
    prompts: int
    tokens: int


@dataclass(frozen=True, eq=False)
class JacobianLens:
    """What a small change of the residual stream after each layer does to the input of the unembedding.

    To first order, adding delta to `blocks.l.hook_resid_post` moves the normalised final residual stream, in the basis
    that the folded unembedding W_U' reads, by J[l] @ delta at the last position, in the mean over the prompts; so
    neuron i's write direction moves the logits along (J[l] @ W_out[i]) @ W_U'. It says nothing of doses at which the
    model answers non-linearly, nor of prompts unlike its own; `stderr` says how far these prompts agree.
    """

    J: Float[Tensor, "layer d_model d_model"]
    """Output coordinate, then coordinate of the change; float32."""
    stderr: Float[Tensor, "layer d_model d_model"]
    """Standard error of J over the prompts; NaN of one prompt."""
    layers: tuple[int, ...]
    source: LensSource
    signature: Float[Tensor, "matrix sample"]
    """A sample of the model's folded weights, by which a lens of another model is told."""

    @property
    def fingerprint(self) -> str:
        """A digest of J."""
        return fingerprint(self.J.flatten(1))

    def of(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """J of one layer.

        Raises:
            ValueError: the lens does not hold it.
        """
        if layer not in self.layers:
            raise ValueError(
                f"lens: it holds layers {list(self.layers)}, got {layer}; make it with layers=[..., {layer}]"
            )
        return self.J[self.layers.index(layer)]

    def carry(self, directions: Float[Tensor, "n d_model"], layer: int) -> Float[Tensor, "n d_model"]:
        """Directions written after a layer, as the unembedding sees them: J @ x for each row x."""
        return directions.float() @ self.of(layer).to(directions.device).T

    def relative_error(self) -> Float[Tensor, " layer"]:
        """Length of the standard error over that of J, layer by layer: whether the prompts suffice."""
        return self.stderr.flatten(1).norm(dim=1) / self.J.flatten(1).norm(dim=1)

    def require_model(self, weights: MLPWeights) -> None:
        """Refuse a model that the lens was not made of.

        Raises:
            ValueError: another width, or other weights.
        """
        if weights.d_model != self.J.shape[-1]:
            raise ValueError(f"lens: made of a model of d_model {self.J.shape[-1]}, this one's is {weights.d_model}")
        own = signature(weights)
        if own.shape != self.signature.shape:
            raise ValueError(f"lens: made of another model ({self.source.model}), of other layers or widths")
        error = float(((own - self.signature).norm(dim=1) / self.signature.norm(dim=1)).max())
        allowed = 1e-4 if weights.dtype == self.source.dtype else 4e-3  # half a unit of bf16's last place is 2e-3
        if error > allowed:
            raise ValueError(
                f"lens: made of another model ({self.source.model}): weights differ by {error:.2g}, expected at most "
                f"{allowed}; make a lens of this model with jacobian_lens"
            )

    def save(self, path: str | Path) -> None:
        """Write the lens to one safetensors file, whole or not at all."""
        from tl_flash import storage

        header = {"layers": list(self.layers), "source": asdict(self.source)}
        tensors = {"J": self.J, "stderr": self.stderr, "signature": self.signature}
        storage.write(FORMAT, VERSION, header, tensors, path)

    @classmethod
    def load(cls, path: str | Path) -> JacobianLens:
        """Read a lens that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, altered, no lens, or of a newer format.
        """
        from tl_flash import storage

        header, tensors = storage.read(FORMAT, VERSION, path)
        return cls(**tensors, layers=tuple(header["layers"]), source=LensSource(**header["source"]))

    def __repr__(self) -> str:
        source = self.source
        return (
            f"JacobianLens of {source.model}: layers {list(self.layers)}, d_model {self.J.shape[-1]}, from "
            f"{source.prompts} prompts of {source.tokens} tokens in all, relative standard error "
            f"{float(self.relative_error().max()):.3f} at most"
        )


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
    weights = models.read(model)
    chosen = models.chosen_layers(layers, weights.n_layers)
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


def signature(weights: MLPWeights) -> Float[Tensor, "matrix sample"]:
    """Some entries of each layer's folded directions and of the folded unembedding, the same however it was loaded."""

    def sample(matrix: Tensor) -> Tensor:
        places = torch.linspace(0, matrix.numel() - 1, _SAMPLES).long()
        return matrix.flatten()[places.to(matrix.device)].float().cpu()

    rows = [sample(weights.directions(layer, side)) for layer in range(weights.n_layers) for side in ("in", "out")]
    columns = torch.linspace(0, weights.d_vocab - 1, _SAMPLES).long().to(weights.W_U.device)
    W_U = weights.W_U.detach()
    centred = W_U[:, columns].float() - W_U.mean(1, dtype=torch.float32)[:, None]
    if weights.final_gain is not None:
        centred = centred * weights.final_gain[:, None].to(centred.device)
    if weights.centre:
        centred = centred - centred.mean(0)
    return torch.stack([*rows, sample(centred)])
