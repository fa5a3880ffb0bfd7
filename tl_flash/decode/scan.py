"""One pass over a model's weights that scores every neuron on the tokens of any number of concepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tl_flash.decode.assembly import shuffled_rows
from tl_flash.decode.feed import made_ahead
from tl_flash.decode.units import BLOCK
from tl_flash.decode.wording import TokenSet, shown
from tl_flash.kernel import Columns, Unembedding, column_lengths, parts
from tl_flash.lens import JacobianLens
from tl_flash.maps import ConceptNull, ConceptTable, Rows, moments_by_bin
from tl_flash.progress import track
from tl_flash.weights import MLPWeights

BINS, MATCHED = 8, 128
"""Lengths of columns that tokens are matched in, and how many random tokens of each stand for the vocabulary."""
_FEWEST = 16
"""Tokens beside the concepts' that there must be to draw from."""


class Block(NamedTuple):
    """Some neurons of one layer, read on one side."""

    rows: Rows
    side: str
    start: int
    """Of the block within its layer."""
    x: Float[Tensor, "n d_model"]


@dataclass(frozen=True, eq=False)
class Scan:
    """What every neuron is scored on: the tokens of the concepts, and as many random ones as their null needs."""

    columns: Columns
    """Of the concepts' tokens, then of the random ones, bin by bin."""
    ids: tuple[tuple[int, ...], ...]
    """By concept."""
    weights: Float[Tensor, "token concept"]
    """Of each of the concepts' tokens in each concept; every concept's sum to 1."""
    bins: tuple[slice, ...]
    """Of the random tokens, within the columns."""
    bin_of: Int64[Tensor, " token"]
    """The bin of each of the concepts' tokens."""
    places: tuple[Int64[Tensor, " own"], ...]
    """By concept, the rows of `weights` that are its own."""

    @classmethod
    def of(cls, unembedding: Unembedding, sets: Sequence[TokenSet], nameless: Sequence[int], seed: int) -> Scan:
        """Choose the random tokens, of all that have a name and are no concept's.

        Raises:
            ValueError: too few tokens are left to draw from.
        """
        ids = sorted({id for tokens in sets for id in tokens})
        lengths = column_lengths(unembedding).cpu()
        others = torch.ones(len(lengths), dtype=torch.bool)
        others[[*ids, *nameless]] = False
        left = others.nonzero()[:, 0]
        if len(left) < _FEWEST:
            raise ValueError(
                f"tokens: expected at least {_FEWEST} of the vocabulary beside the concepts' to compare with, got "
                f"{len(left)} of {len(lengths)}; ask for fewer"
            )
        by_length = left[lengths[left].argsort(stable=True)]
        cuts = list(parts(len(left), -(-len(left) // max(1, min(BINS, len(left) // _FEWEST)))))
        generator = torch.Generator().manual_seed(seed)
        drawn = [by_length[cut][torch.randperm(cut.stop - cut.start, generator=generator)[:MATCHED]] for cut in cuts]
        ends = torch.tensor([len(ids), *map(len, drawn)]).cumsum(0).tolist()
        inner = lengths[by_length[[cut.start for cut in cuts[1:]]]]
        weights = torch.zeros(len(ids), len(sets))
        places = tuple(torch.tensor([ids.index(id) for id in tokens]) for tokens in sets)
        for at, tokens in enumerate(sets):
            weights[places[at], at] = torch.tensor(list(tokens.values())) / sum(tokens.values())
        return cls(
            columns=Columns.of(unembedding, torch.cat([torch.tensor(ids), *drawn])),
            ids=tuple(tuple(tokens) for tokens in sets),
            weights=weights,
            bins=tuple(slice(*ends[at : at + 2]) for at in range(len(drawn))),
            bin_of=torch.bucketize(lengths[ids], inner, right=True),
            places=places,
        )

    def means(self, z: Float[Tensor, "n column"]) -> Float[Tensor, "n concept"]:
        """Mean z over each concept's tokens."""
        return z[:, : len(self.weights)] @ self.weights.to(z.device)

    def carried(
        self, z: Float[Tensor, "n column"], means: Float[Tensor, "n concept"]
    ) -> tuple[Float[Tensor, "n concept"], Int64[Tensor, "n concept"]]:
        """How many tokens carry each mean, and which of the concept's own adds most to it."""
        own, weights = z[:, : len(self.weights)], self.weights.to(z.device)
        breadth = means.square() / (own.square() @ weights.square())
        top = [
            (own[:, place] * weights[place, at] * means[:, at, None].sign()).argmax(1)
            for at, place in enumerate(self.places)
        ]
        return breadth, torch.stack(top, dim=1)


class _Reading:
    """One reading of all neurons, filled in block by block."""

    def __init__(self, plan: Scan, total: int) -> None:
        self._plan, n_concepts = plan, plan.weights.shape[1]
        self.z, self.breadth = torch.empty(n_concepts, total), torch.empty(n_concepts, total, dtype=torch.float16)
        self.top = torch.empty(n_concepts, total, dtype=torch.int16)
        self.mean, self.variance = torch.empty(2, total, len(plan.bins))
        self.kurtosis = torch.empty(total)
        self.shuffled: list[Float[Tensor, "draw concept"]] = []

    def add(self, block: Block) -> None:
        """Score a block, and with a layer's last one its shuffled directions, whose coordinates come block by block."""
        here = slice(block.rows.start + block.start, block.rows.start + block.start + len(block.x))
        z = self._plan.columns.z(block.x)
        means = self._plan.means(z)
        breadth, top = self._plan.carried(z, means)
        for kept, made in ((self.z, means), (self.breadth, breadth), (self.top, top)):
            kept[:, here] = made.T.to("cpu", kept.dtype)
        moments = moments_by_bin(z, self._plan.bins)
        for kept, made in zip((self.mean, self.variance, self.kurtosis), moments, strict=True):
            kept[here] = made.cpu()
        self._shuffle(block)

    def _shuffle(self, block: Block) -> None:
        if block.start == 0:
            self._from = shuffled_rows(block.rows.count, block.x.shape[1], seed=block.rows.layer).to(block.x.device)
            self._x = torch.zeros(self._from.shape, device=block.x.device)
        here = (self._from >= block.start) & (self._from < block.start + len(block.x))
        places = (self._from - block.start).clamp(0, len(block.x) - 1)
        self._x = torch.where(here, block.x.gather(0, places), self._x)
        if block.start + len(block.x) == block.rows.count:
            self.shuffled.append(self._plan.means(self._plan.columns.z(self._x)).cpu())

    def null(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of shuffled directions: location and scale [concept, layer], excess kurtosis [concept]."""
        draws = torch.stack(self.shuffled).double()  # [layer, draw, concept]
        alive = ~draws.isnan()
        count = alive.sum(1, keepdim=True)
        location = draws.nan_to_num().sum(1, keepdim=True) / count
        centred = torch.where(alive, draws - location, 0.0)
        scale = (centred.square().sum(1, keepdim=True) / (count - 1)).sqrt()
        fourth = (centred / scale).nan_to_num() ** 4
        kurtosis = fourth.sum((0, 1)) / alive.sum((0, 1)) - 3
        return location[:, 0].T.float(), scale[:, 0].T.float(), kurtosis.float()


def scan(
    weights: MLPWeights,
    unembedding: Unembedding,
    concepts: Mapping[str, TokenSet],
    *,
    sides: Sequence[str],
    layers: Sequence[int],
    lens: JacobianLens | None,
    progress: bool | None,
) -> ConceptTable:
    """Score every neuron of some layers on each concept, and shuffled ones beside them."""
    plan = Scan.of(unembedding, list(concepts.values()), weights.vocab.nameless(), seed=0)
    write = "out" if lens is None else "lens"
    names = (*(side for side in sides if side != write), write)
    rows = _rows(weights, layers)
    readings = {name: _Reading(plan, rows[-1].start + rows[-1].count) for name in names}
    held = list(dict.fromkeys("out" if name == "lens" else name for name in names))
    blocks = made_ahead(_blocks(weights, rows, held, unembedding.device), weights.on_disk)
    count = len(held) * sum(-(-each.count // BLOCK) for each in rows)
    for block in track(blocks, "searching", progress, total=count):
        if block.side in readings:
            readings[block.side].add(block)
        if block.side == "out" and lens is not None:
            readings["lens"].add(block._replace(x=lens.carry(block.x, block.rows.layer)))
    every = list(readings.values())
    location, scale, kurtosis = (torch.stack(each, dim=1) for each in zip(*(r.null() for r in every), strict=True))
    return ConceptTable(
        names=tuple(concepts),
        tokens=tuple(shown(weights.vocab, tokens) for tokens in concepts.values()),
        sides=tuple(sides),
        readings=names,
        rows=rows,
        z=torch.stack([reading.z for reading in every], dim=1),
        breadth=torch.stack([reading.breadth for reading in every], dim=1),
        top=torch.stack([reading.top for reading in every], dim=1),
        ids=plan.ids,
        null=ConceptNull(
            location=location,
            scale=scale,
            kurtosis=kurtosis,
            bin_mean=torch.stack([reading.mean for reading in every]),
            bin_variance=torch.stack([reading.variance for reading in every]),
            token_kurtosis=torch.stack([reading.kurtosis for reading in every]),
            weights=tuple(plan.weights[place, at] for at, place in enumerate(plan.places)),
            bins=tuple(plan.bin_of[place] for place in plan.places),
        ),
        model=weights.name,
        vocab=weights.vocab,
    )


def _rows(weights: MLPWeights, layers: Sequence[int]) -> tuple[Rows, ...]:
    weights.require_layers(layers)
    rows: list[Rows] = []
    for layer in layers:
        read = weights.layer(layer)
        start = rows[-1].start + rows[-1].count if rows else 0
        rows.append(Rows(layer, start, read.n_neurons, read.n_experts))
    return tuple(rows)


def _blocks(
    weights: MLPWeights, rows: Sequence[Rows], sides: Sequence[str], device: torch.device
) -> Iterator[Block]:
    for each in rows:
        for side in sides:
            for part in parts(each.count, BLOCK):
                x = weights.directions(each.layer, side, neurons=part, device=device)
                yield Block(each, side, part.start, x)
