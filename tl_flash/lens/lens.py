"""The mean Jacobian from each layer's residual stream to the output: what is written early, as the output sees it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from tl_flash import artefacts
from tl_flash.lens.source import LensSource, signature
from tl_flash.weights import MLPWeights, fingerprint

FORMAT = "tl_flash.JacobianLens"
VERSION = 2


@dataclass(frozen=True, eq=False)
class JacobianLens:
    """What a small change of the residual stream after each layer does to the input of the unembedding.

    To first order, adding delta to `blocks.l.hook_resid_post` at every position but the first moves the normalised
    final residual stream, in the basis that the folded unembedding W_U' reads, by J[l] @ delta in the mean over texts
    and over their positions from the 8th on; so neuron i's write direction moves the logits along
    (J[l] @ W_out[i]) @ W_U'. It says nothing of doses at which the model answers non-linearly, nor of texts unlike its
    own; `jacobian_lens` says what each of its methods neglects.
    """

    J: Float[Tensor, "layer d_model d_model"]
    """Output coordinate, then coordinate of the change; float32."""
    stderr: Float[Tensor, "layer d_model d_model"]
    """Standard error of J by the choice of texts, NaN of one text: of the exact mean from the spread over texts, of the
    others half the difference of the lenses of two halves of them. What a method neglects is not in it."""
    layers: tuple[int, ...]
    source: LensSource
    signature: Float[Tensor, "matrix sample"]
    """A sample of the model's folded weights, by which a lens of another model is told."""

    @property
    def fingerprint(self) -> str:
        """A digest of J."""
        return fingerprint(self.J.flatten(1))

    def at(self, layer: int) -> Float[Tensor, "d_model d_model"]:
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
        return directions.float() @ self.at(layer).to(directions.device).T

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
        return cls(**tensors, layers=tuple(header["layers"]), source=LensSource.of_header(header["source"]))

    def __repr__(self) -> str:
        source = self.source
        return (
            f"JacobianLens of {source.model} ({source.method}): layers {list(self.layers)}, d_model "
            f"{self.J.shape[-1]}, from "
            f"{source.prompts} prompts of {source.tokens} tokens in all, relative standard error "
            f"{float(self.relative_error().max()):.3f} at most"
        )
