"""One pass over a model's weights that scores every neuron on the tokens of any number of concepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tl_flash.decode.feed import made_ahead
from tl_flash.decode.null import shuffled_rows
from tl_flash.decode.units import BLOCK
from tl_flash.decode.wording import TokenSet, shown
from tl_flash.kernel import Columns, Unembedding, column_lengths, parts
from tl_flash.lens import JacobianLens
from tl_flash.maps import ConceptNull, ConceptTable, Rows, moments_by_bin
from tl_flash.progress import track
from tl_flash.weights import MLPWeights

BINS, MATCHED = 8, 128
"""Lengths of columns that tokens are matched in, and how many random tokens of each stand for the vocabulary."""
_SHUFFLED = 512
"""Shuffled directions a layer and side: fewer than a map's null has, since their mean and variance are known."""
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

    own: Columns
    """Of the concepts' tokens."""
    all: Columns
    """Of these, then of the random ones, each by its length."""
    ids: tuple[tuple[int, ...], ...]
    """By concept."""
    weights: Float[Tensor, "token concept"]
    """Of each of the concepts' tokens in each concept; every concept's sum to 1."""
    lengths: Float[Tensor, " token"]
    """Of the concepts' tokens' columns."""
    share: Float[Tensor, "token bin"]
    """Of each random token in its bin: 1 / their number."""
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
        drawn, inner = _drawn_by_length(lengths, [*ids, *nameless], seed)
        share = torch.block_diag(*(torch.full((len(some), 1), 1 / len(some)) for some in drawn))
        weights = torch.zeros(len(ids), len(sets))
        places = tuple(torch.tensor([ids.index(id) for id in tokens]) for tokens in sets)
        for at, tokens in enumerate(sets):
            weights[places[at], at] = torch.tensor(list(tokens.values())) / sum(tokens.values())
        chosen = torch.cat([torch.tensor(ids), *drawn])
        every, divisor = Columns.of(unembedding, chosen), lengths[chosen].to(unembedding.device)
        divisor[: len(ids)] = 1
        return cls(
            own=Columns(every.columns[:, : len(ids)], every.covariance),
            all=Columns(every.columns / divisor, every.covariance),
            ids=tuple(tuple(tokens) for tokens in sets),
            weights=weights.to(unembedding.device),
            lengths=lengths[ids],
            share=share.to(unembedding.device),
            bin_of=torch.bucketize(lengths[ids], inner, right=True),
            places=places,
        )

    def carried(
        self, z: Float[Tensor, "n token"], means: Float[Tensor, "n concept"]
    ) -> tuple[Float[Tensor, "n concept"], Int64[Tensor, "n concept"]]:
        """How many tokens carry each mean, and which of the concept's own adds most to it."""
        breadth = means.square() / (z.square() @ self.weights.square())
        top = [
            (z[:, place] * self.weights[place, at] * means[:, at, None].sign()).argmax(1)
            for at, place in enumerate(self.places)
        ]
        return breadth, torch.stack(top, dim=1)


def _drawn_by_length(
    lengths: Float[Tensor, " d_vocab"], never: Sequence[int], seed: int
) -> tuple[list[Int64[Tensor, " token"]], Float[Tensor, " edge"]]:
    """Random tokens from equal shares of the vocabulary, ordered by length of column, and the lengths between these."""
    others = lengths > 0
    others[list(never)] = False
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
    return drawn, lengths[by_length[[cut.start for cut in cuts[1:]]]]


class _Reading:
    """One reading of all neurons, filled in block by block."""

    def __init__(self, plan: Scan, total: int) -> None:
        self._plan, n_concepts = plan, plan.weights.shape[1]
        self.z, self.breadth = torch.empty(n_concepts, total), torch.empty(n_concepts, total, dtype=torch.float16)
        self.top = torch.empty(n_concepts, total, dtype=torch.int16)
        self.mean, self.variance = torch.empty(2, total, plan.share.shape[1])
        self.kurtosis = torch.empty(total)
        self._nulls: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, block: Block) -> None:
        """Score a block, and with a layer's last one its shuffled directions."""
        here = slice(block.rows.start + block.start, block.rows.start + block.start + len(block.x))
        z, random = self._plan.all.z(block.x).tensor_split([len(self._plan.weights)], dim=1)
        means = z @ self._plan.weights
        breadth, top = self._plan.carried(z, means)
        for kept, made in ((self.z, means), (self.breadth, breadth), (self.top, top)):
            kept[:, here] = made.T.to("cpu", kept.dtype)
        moments = moments_by_bin(random, self._plan.share)
        for kept, made in zip((self.mean, self.variance, self.kurtosis), moments, strict=True):
            kept[here] = made.cpu()
        if block.start == 0:
            self._shuffled = Shuffled(block.rows, block.x)
        self._shuffled.add(block)
        if block.start + len(block.x) == block.rows.size:
            self._nulls.append(self._shuffled.moments(self._plan))

    def null(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of shuffled directions: location and scale [concept, layer], excess kurtosis [concept] over all layers."""
        location, scale, fourth = (torch.stack(each, dim=1) for each in zip(*self._nulls, strict=True))
        return location, scale, fourth.nanmean(1) - 3


class Shuffled:
    """A layer's shuffled directions on one side, gathered as its blocks come by."""

    def __init__(self, rows: Rows, like: Tensor) -> None:
        drawn = shuffled_rows(rows.size, like.shape[1], seed=rows.layer, draws=_SHUFFLED)
        self._from = drawn.to(like.device)
        self._n = rows.size
        self._x = torch.zeros(self._from.shape, device=like.device)
        self._sum, self._squares = torch.zeros(2, like.shape[1], dtype=torch.float64, device=like.device)

    def add(self, block: Block) -> None:
        """Take the coordinates that come from this block."""
        if len(block.x) == self._n:
            self._x = block.x.gather(0, self._from)
        else:
            here = (self._from >= block.start) & (self._from < block.start + len(block.x))
            places = (self._from - block.start).clamp(0, len(block.x) - 1)
            self._x = torch.where(here, block.x.gather(0, places), self._x)
        self._sum += block.x.sum(0, dtype=torch.float64)
        self._squares += block.x.square().sum(0, dtype=torch.float64)

    def moments(self, plan: Scan) -> tuple[Tensor, Tensor, Tensor]:
        """Location, scale and standardised fourth moment of their mean z over each concept's tokens, [concept].

        Of those that are not zero; NaN where fewer than two are left.

        A direction's score, z times its standard deviation over the vocabulary, is a sum of independent coordinates,
        so its mean and variance are known; what the draws miss of them is put right in those of z.
        """
        some = self._x.any(1)
        x = self._x if some.all() else self._x[some]
        if len(x) < 2:
            nothing = torch.full((plan.weights.shape[1],), torch.nan)
            return nothing, nothing, nothing
        z = (plan.own.z(x) @ plan.weights).double()
        mean_column = plan.own.columns.double() @ plan.weights.double()
        score = (x @ mean_column.float()).double()
        mean = self._sum / self._n
        variance = self._squares / self._n - mean.square()
        slope = ((z - z.mean(0)) * (score - score.mean(0))).mean(0) / score.var(0, correction=0)
        location = z.mean(0) + slope * (mean @ mean_column - score.mean(0))
        scale = z.std(0) * (variance @ mean_column.square() / score.var(0)).sqrt()
        fourth = ((z - z.mean(0)) / z.std(0)).pow(4).mean(0)
        return location.float().cpu(), scale.float().cpu(), fourth.float().cpu()


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
    readings = {name: _Reading(plan, rows[-1].start + rows[-1].size) for name in names}
    held = list(dict.fromkeys("out" if name == "lens" else name for name in names))
    blocks = made_ahead(_blocks(weights, rows, held, unembedding.device), weights.on_disk)
    count = len(held) * sum(-(-each.size // BLOCK) for each in rows)
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
            weights=tuple(plan.weights[place, at].cpu() for at, place in enumerate(plan.places)),
            lengths=tuple(plan.lengths[place] for place in plan.places),
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
        start = rows[-1].start + rows[-1].size if rows else 0
        rows.append(Rows(layer, start, read.n_neurons, read.n_experts))
    return tuple(rows)


def _blocks(weights: MLPWeights, rows: Sequence[Rows], sides: Sequence[str], device: torch.device) -> Iterator[Block]:
    for each in rows:
        for side in sides:
            for part in parts(each.size, BLOCK):
                x = weights.directions(each.layer, side, neurons=part, device=device)
                yield Block(each, side, part.start, x)
