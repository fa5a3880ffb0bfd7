"""The mean Jacobian from each layer's residual stream to the output: what is written early, as the output sees it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash import artefacts
from tl_flash.weights import MLPWeights, fingerprint

FORMAT = "tl_flash.JacobianLens"
VERSION = 1
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
        header = {"layers": list(self.layers), "source": asdict(self.source)}
        tensors = {"J": self.J, "stderr": self.stderr, "signature": self.signature}
        artefacts.write(FORMAT, VERSION, header, tensors, path)

    @classmethod
    def load(cls, path: str | Path) -> JacobianLens:
        """Read a lens that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, altered, no lens, or of a newer format.
        """
        header, tensors = artefacts.read(FORMAT, VERSION, path)
        return cls(**tensors, layers=tuple(header["layers"]), source=LensSource(**header["source"]))

    def __repr__(self) -> str:
        source = self.source
        return (
            f"JacobianLens of {source.model}: layers {list(self.layers)}, d_model {self.J.shape[-1]}, from "
            f"{source.prompts} prompts of {source.tokens} tokens in all, relative standard error "
            f"{float(self.relative_error().max()):.3f} at most"
        )


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
