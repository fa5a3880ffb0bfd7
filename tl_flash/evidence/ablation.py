"""A prompt's score with many neurons at their references: each alone, or all but the first few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_flash.clamps import clamp_spots
from tl_flash.evidence.attribution import Target
from tl_flash.progress import track
from tl_flash.weights import measuring

_TOKENS_AT_ONCE = 2**9
_SPOTS_AT_ONCE = 2**28


@dataclass(frozen=True, eq=False)
class Ablation:
    """A prompt whose neurons can be set to their references; a spot is a neuron at a position.

    Spots are numbered as an array [layer, position, neuron] is when it is laid flat.
    """

    model: Any
    row: Int[Tensor, " position"]
    target: Target
    reference: Float[Tensor, "layer neuron"]
    batch_size: int | None = None
    progress: bool | None = None

    def alone(self, spots: Int[Tensor, " spot"]) -> Float[Tensor, " spot"]:
        """The score with each of these spots at its reference."""
        return self.scores([spot[None] for spot in spots], "removing neurons")

    def scores(self, sets: Sequence[Int[Tensor, " spot"]], what: str) -> Float[Tensor, " set"]:
        """The score with all spots of each set at their references."""
        n_layers, d_mlp = self.reference.shape
        shape = (n_layers, len(self.row), d_mlp)
        spots = n_layers * len(self.row) * d_mlp
        size = max(1, min(_TOKENS_AT_ONCE // len(self.row), _SPOTS_AT_ONCE // spots))
        size = size if self.batch_size is None else self.batch_size
        found = []
        starts = range(0, len(sets), size)
        with measuring(self.model), _last_alone(self.model):
            for start in track(starts, what, self.progress, total=len(starts)):
                where = torch.zeros(len(sets[start : start + size]), spots, dtype=torch.bool)
                for row, chosen in zip(where, sets[start : start + size], strict=True):
                    row[chosen] = True
                with clamp_spots(self.model, where.view(-1, *shape), self.reference):
                    tokens = self.row.expand(len(where), -1)
                    logits = self.model(tokens.to(self.model.W_U.device))[:, -1]
                found.append(self.target.score(logits).cpu())
        return torch.cat(found)


@contextmanager
def _last_alone(model: Any) -> Iterator[None]:
    """Unembed the last position alone: in a small model with a large vocabulary the others are most of the work."""
    handle = model.unembed.register_forward_pre_hook(lambda module, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def counts_to(n: int) -> list[int]:
    """1, 2, 5, 10, ... and n."""
    return [*_rising(n), n]


def _rising(n: int) -> Iterator[int]:
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= n:
                return
            yield factor * power
        power *= 10
