"""The mean Jacobian from each layer's residual stream to the output: what is written early, as the output sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_flash import artefacts
from tl_flash.clamps import Prompts, require_hooks
from tl_flash.lens.estimate import Estimate
from tl_flash.lens.published import converted
from tl_flash.lens.source import LensSource, signature
from tl_flash.lens.texts import own_texts
from tl_flash.names import shown_model
from tl_flash.weights import MLPWeights, fingerprint, read

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
    """Standard error of J by the choice of texts, from the spread over them, NaN of one text; of the mixed lens that of
    its parts. What a method neglects is not in it."""
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
        lengths = self.signature.norm(dim=1).clamp(min=1e-30)
        error = float(((own - self.signature).norm(dim=1) / lengths).max())
        allowed = 1e-4 if weights.dtype == self.source.dtype else 4e-3  # half a unit of bf16's last place is 2e-3
        if not error <= allowed:
            raise ValueError(
                f"lens: made of another model ({self.source.model}): weights differ by {error:.2g}, expected at most "
                f"{allowed}; make a lens of this model with jacobian_lens"
            )

    @classmethod
    def of(
        cls, theirs: Any, model: Any, prompts: Sequence[str] | Tensor | None = None, *, batch_size: int = 8
    ) -> JacobianLens:
        """Take over a lens of TransformerLens's class of this name, fitted or from `neuronpedia/jacobian-lens`.

        Theirs (Gurnee et al. 2026, arXiv 2607.15495) carries a change to before the final norm, without the last layer,
        where it is the identity; it is summed over later positions and averaged over those of the change, from 16 on.
        So it is multiplied by the mean Jacobian of the final norm, and the last layer is added. Base and fine-tuned
        weights are too near to each other to be told apart by what they do: names and revisions do that, where known.

        Args:
            theirs: a `transformer_lens.tools.analysis.JacobianLens`.
            model: the one that it was fitted to, as a HookedTransformer or a TransformerBridge, folded or not.
            prompts: texts over which the final norm is averaged, and on which the lens is compared with the mean-field
                one; by default the package's own.
            batch_size: prompts a forward pass.

        Raises:
            TypeError: no such lens or model.
            ValueError: a lens of another model, or one that is unlike what this model's blocks do.
        """
        require_hooks(model)
        weights = read(model)
        texts = own_texts(model) if prompts is None else Prompts.of(model, prompts)
        made, layers = converted(theirs, model, weights, texts, batch_size)
        return cls.with_papers(made, weights, layers, "published")

    @classmethod
    def with_papers(
        cls, made: Estimate, weights: MLPWeights, layers: Sequence[int], method: str, seconds: float | None = None
    ) -> JacobianLens:
        """An estimate with what tells where it comes from."""
        source = LensSource(
            model=weights.name,
            dtype=weights.dtype,
            method=method,
            prompts=made.prompts,
            tokens=made.tokens,
            measured=made.measured,
            seconds=None if seconds is None else round(seconds, 3),
        )
        return cls(made.J, made.stderr, tuple(layers), source, signature(weights))

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
        tokens = "" if source.tokens is None else f" of {source.tokens} tokens in all"
        seconds = "" if source.seconds is None else f" in {source.seconds:.1f} s"
        error = float(self.relative_error().max())
        told = "" if math.isnan(error) else f", relative standard error {error:.3f} at most"
        return (
            f"JacobianLens of {shown_model(source.model)} ({source.method}): layers {list(self.layers)}, d_model "
            f"{self.J.shape[-1]}, from {source.prompts} prompts{tokens}{seconds}{told}"
        )
