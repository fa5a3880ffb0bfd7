"""The top tokens of every neuron at one pole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from tl_flash.vocab import Vocab


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The top tokens of every neuron at one pole, best first; equal logits go to the lower id."""

    ids: Int32[Tensor, "layer neuron k"]
    """-1 for a zero direction, whose other numbers are NaN."""
    logits: Float[Tensor, "layer neuron k"]
    """Scores minus their vocabulary mean (of -x at the negative pole); under the cosine score, cosines."""
    log_z: Float[Tensor, "layer neuron"]
    """logsumexp over the vocabulary of the logits after ln_final."""
    write_z: Float[Tensor, "layer neuron k"]
    """Each token's z-score in the neuron's own write direction; its sign is hook_post's that raises the token."""
    std: Float[Tensor, "layer neuron"]
    tau: Float[Tensor, "layer neuron"]
    """What ln_final multiplies the direction by; see `tau_of`."""
    vocab: Vocab
    score: str

    def __repr__(self) -> str:
        layers, neurons, k = self.ids.shape
        return f"TopTokens of {layers} layers x {neurons} neurons, k={k}"

    @property
    def z(self) -> Float[Tensor, "layer neuron k"]:
        """Logits over their standard deviation in the vocabulary; free of the direction's length."""
        return self.logits / self.std[..., None]

    @property
    def probs(self) -> Float[Tensor, "layer neuron k"]:
        """softmax(unembed(ln_final(x))) at these tokens.

        Raises:
            ValueError: the map is of cosines.
        """
        require_probabilities(self.score)
        return torch.exp(self.tau[..., None] * self.logits - self.log_z[..., None])

    @property
    def strings(self) -> np.ndarray:
        """Display strings, an object array [layer, neuron, k]."""
        return self.vocab.names[self.ids.numpy()]


def tau_of(norm: Float[Tensor, "*shape"], d_model: int, *, final_norm: bool) -> Float[Tensor, "*shape"]:
    """What the norm before the unembedding multiplies directions of these lengths by: 1 where there is none."""
    return d_model**0.5 / norm if final_norm else torch.ones_like(norm)


def require_probabilities(score: str) -> None:
    """Refuse to speak of probabilities where the scores are cosines."""
    if score != "dot":
        raise ValueError('probabilities: a map of score "cosine" has none; decode with score="dot"')
