"""What the engine answers, and the order that tokens have in it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Readout:
    """What n directions stand for; every tensor on the CPU.

    Pole 0 reads x, pole 1 reads -x. Logits descend; equal ones are ordered by token id.
    A zero direction has no reading: its ids are -1, its norm is 0, and its other numbers are NaN.
    """

    ids: Tensor
    #   int32 [2, n, k]
    logits: Tensor
    #   float32 [2, n, k]
    log_z: Tensor
    #   float32 [2, n], logsumexp of +-tau * s over the vocabulary; NaN under "cosine"
    norm: Tensor
    #   float32 [n], the length that tau divides by
    mean: Tensor
    #   float32 [n], mean of the scores over the vocabulary (taken off, but for "cosine")
    std: Tensor
    #   float32 [n]
    kurtosis: Tensor
    #   float32 [n], excess kurtosis
    tracked: Tensor
    #   float32 [n, t], scores of the tokens asked for
    repaired: int

    @property
    def zero(self) -> Tensor:
        """Which directions are zero, bool [n]."""
        return self.ids[0, :, 0] < 0


def sort_tokens(scores: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest along the last axis, descending, ties to the lower id: scores and tokens."""
    tokens, order = tokens.sort(-1)
    scores, again = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], tokens.gather(-1, again[..., :k])
