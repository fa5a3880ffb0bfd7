"""Every neuron's mean z over the tokens of some concepts: which are about them, and where a model keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int16, Int64
from torch import Tensor

from tl_flash.maps.concept_hits import ConceptHit, ConceptHits
from tl_flash.maps.concept_null import ConceptNull
from tl_flash.maps.ranked import raising_sign
from tl_flash.maps.search import require_count
from tl_flash.names import AnyNeuron, ExpertNeuron, Neuron, shown_model
from tl_flash.vocab import Vocab

if TYPE_CHECKING:
    import pandas as pd

ORDERS = ("z", "p", "coherence")


class Rows(NamedTuple):
    """One layer's neurons among all that were searched: `size` rows from `start` on."""

    layer: int
    start: int
    size: int
    n_experts: int | None

    def neuron(self, row: int) -> AnyNeuron:
        """The neuron of a row of this layer."""
        index = row - self.start
        if self.n_experts is None:
            return Neuron(self.layer, index)
        return ExpertNeuron(self.layer, *divmod(index, self.size // self.n_experts))


@dataclass(frozen=True, eq=False)
class ConceptTable:
    """Neurons by concepts. `concepts` makes it; `table["dog"]` are the neurons about one of its concepts."""

    names: tuple[str, ...]
    tokens: tuple[dict[str | int, float], ...]
    """By concept, its tokens with their weights."""
    sides: tuple[str, ...]
    """Those searched."""
    readings: tuple[str, ...]
    """Those read: these, and last of all the one that says what a neuron writes, "lens" or "out"."""
    rows: tuple[Rows, ...]
    """The layers, whose neurons follow one another along the last axis of the tensors."""
    z: Float[Tensor, "concept reading neuron"]
    """Weighted mean z of each concept's tokens; NaN of a zero direction."""
    breadth: Float[Tensor, "concept reading neuron"]
    """How many tokens carry it, in half precision."""
    top: Int16[Tensor, "concept reading neuron"]
    """Which of the concept's tokens, in the order of `ids`, adds most to it."""
    ids: tuple[tuple[int, ...], ...]
    null: ConceptNull = field(repr=False)
    model: str
    vocab: Vocab = field(repr=False)

    def __getitem__(self, concept: str) -> ConceptHits:
        """The twenty best neurons of a concept; see `hits`."""
        return self.hits(concept)

    def hits(
        self, concept: str, n: int = 20, *, side: str | None = None, by: str = "z", pole: int | None = None
    ) -> ConceptHits:
        """The neurons about a concept, best first.

        Args:
            concept: one of `names`.
            n: how many at most.
            side: one of `sides` alone; by default all, each neuron on each side.
            by: "z" (|mean z|), "p" (the least p-value, the larger of a neuron's two) or "coherence": neurons that read
                the concept and write it, by the smaller of the two |z|, with the larger of their p-values.
            pole: 1 for positive z alone, -1 for negative z alone.

        Raises:
            KeyError: an unknown concept.
            ValueError: an unknown side, order or pole, n below 1, or coherence without a read side.
        """
        _require(n, by)
        if pole not in (None, 1, -1):
            raise ValueError(f"pole: expected 1, -1 or None for both, got {pole!r}")
        at = self.number(concept)
        return self._ranked(at, self._chosen(side, by), self._read_p_values(at), n, by, pole)

    def _ranked(
        self,
        at: int,
        sides: tuple[str, ...],
        read: Float64[np.ndarray, "null reading neuron"],
        n: int,
        by: str,
        pole: int | None = None,
    ) -> ConceptHits:
        """The best on some sides, by the p-values of all readings."""
        z, p = self.z[at, [self.readings.index(one) for one in sides]], self._p_of(read, sides, by)
        key = z.abs().double()
        if by == "p":
            key = -torch.from_numpy(p.max(0))
        elif by == "coherence":
            key = torch.minimum(key, self.z[at, -1].abs().double())
        key = torch.where(key.isnan() | z.isnan() | (z * (pole or 0) < 0), -torch.inf, key).flatten()
        order = key.argsort(descending=True, stable=True)[:n]
        order = order[key[order] > -torch.inf]
        places = [divmod(flat, z.shape[1]) for flat in order.tolist()]
        q = _q_values(p.max(0))
        return ConceptHits(
            hits=tuple(
                self._hit(at, sides[place], row, p[:, place, row], float(q[place, row])) for place, row in places
            ),
            concept=self.names[at],
            tokens=self.tokens[at],
            title=f"neurons of {shown_model(self.model)} about {self.names[at]!r}, {_named(sides)}, by {by}",
            table=self,
        )

    def p_values(self, concept: str, side: str | None = None, by: str = "z") -> Float64[np.ndarray, "null side neuron"]:
        """Of every neuron, on one side or on all of `sides`: against shuffled neurons, and against matched tokens.

        Raises:
            KeyError: an unknown concept.
            ValueError: an unknown side, or coherence without a read side.
        """
        return self._p_of(self._read_p_values(self.number(concept)), self._chosen(side, by), by)

    def _read_p_values(self, at: int) -> Float64[np.ndarray, "null reading neuron"]:
        return self.null.p_values(self.z[at], at, self.layer_numbers())

    def _p_of(
        self, read: Float64[np.ndarray, "null reading neuron"], sides: Sequence[str], by: str
    ) -> Float64[np.ndarray, "null side neuron"]:
        """Of these sides; of coherence the larger of a side's and the writing's."""
        chosen = read[:, [self.readings.index(one) for one in sides]]
        return np.maximum(chosen, read[:, -1:]) if by == "coherence" else chosen

    def q_values(self, concept: str, side: str | None = None, by: str = "z") -> Float64[np.ndarray, "side neuron"]:
        """Benjamini and Hochberg's of the larger of the two `p_values`, over all of these neurons and sides."""
        return _q_values(self.p_values(concept, side, by).max(0))

    def number(self, concept: str) -> int:
        """The place of a concept along the tensors' first axis.

        Raises:
            KeyError: it is none of `names`.
        """
        if concept not in self.names:
            raise KeyError(f"concept {concept!r}: this table has {', '.join(map(repr, self.names))}")
        return self.names.index(concept)

    def neuron(self, row: int) -> AnyNeuron:
        """The neuron at a place along the tensors' last axis."""
        return next(rows for rows in reversed(self.rows) if rows.start <= row).neuron(row)

    def layer_numbers(self) -> Int64[Tensor, " neuron"]:
        """Each neuron's place among `rows`."""
        return torch.arange(len(self.rows)).repeat_interleave(torch.tensor([rows.size for rows in self.rows]))

    def by_layer(self, side: str) -> tuple[Float[Tensor, "concept layer"], Int64[Tensor, "concept layer"]]:
        """The greatest |mean z| of each layer's neurons, and along the tensors' last axis the neuron that has it.

        NaN of a layer whose neurons are all zero.

        Raises:
            ValueError: a side that was not searched.
        """
        (side,) = self._chosen(side, "z")
        z = self.z[:, self.readings.index(side)].abs().nan_to_num(-1)
        best = [z[:, rows.start : rows.start + rows.size].max(1) for rows in self.rows]
        places = [one.indices + rows.start for one, rows in zip(best, self.rows, strict=True)]
        largest = torch.stack([one.values for one in best], dim=1)
        return largest.masked_fill(largest < 0, torch.nan), torch.stack(places, dim=1)

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a neuron and side, a column a concept: mean z."""
        import pandas as pd

        names = [str(rows.neuron(row)) for rows in self.rows for row in range(rows.start, rows.start + rows.size)]
        layers = np.repeat([rows.layer for rows in self.rows], [rows.size for rows in self.rows])
        frames = [
            pd.DataFrame(
                {"neuron": names, "layer": layers, "side": side}
                | {name: self.z[at, self.readings.index(side)].numpy() for at, name in enumerate(self.names)}
            )
            for side in self.sides
        ]
        return pd.concat(frames, ignore_index=True)

    def best(self, n: int = 1, *, by: str = "z") -> pd.DataFrame:
        """A pandas frame of each concept's n best neurons on each side, as `ConceptHits.to_frame` has them."""
        import pandas as pd

        _require(n, by)
        sides, frames = self._chosen(None, by), []
        for at, name in enumerate(self.names):
            read = self._read_p_values(at)
            frames += [self._ranked(at, (side,), read, n, by).to_frame().assign(concept=name) for side in sides]
        return pd.concat(frames, ignore_index=True).reindex(columns=["concept", *ConceptHit._fields])

    def __repr__(self) -> str:
        count = self.z.shape[2]
        return (
            f"ConceptTable of {shown_model(self.model)}: {len(self.names)} concepts, {count:,} neurons in "
            f"{len(self.rows)} layers, {_named(self.sides)}"
        )

    def __str__(self) -> str:
        frame = self.best()
        frame["token"] = frame["token"].map(repr)
        return f"{self!r}; the best neuron of each\n{frame.to_string(index=False, float_format='{:.2g}'.format)}"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(repr(self))}</p>{self.best().to_html(index=False, border=0, float_format='{:.2g}'.format)}"

    def _hit(self, at: int, side: str, row: int, p: Float64[np.ndarray, " null"], q: float) -> ConceptHit:
        reading = self.readings.index(side)
        z, write = float(self.z[at, reading, row]), float(self.z[at, -1, row])
        return ConceptHit(
            neuron=self.neuron(row),
            side=side,
            sign=raising_sign(write),
            z=z,
            write_z=write,
            p_value=float(p[0]),
            p_tokens=float(p[1]),
            q_value=q,
            breadth=float(self.breadth[at, reading, row]),
            token=self.vocab.string(self.ids[at][int(self.top[at, reading, row])]),
        )

    def _chosen(self, side: str | None, by: str) -> tuple[str, ...]:
        if side is not None and side not in self.sides:
            raise ValueError(f"side: expected one of {', '.join(map(repr, self.sides))}, got {side!r}")
        chosen = self.sides if side is None else (side,)
        if by != "coherence":
            return chosen
        read = tuple(one for one in chosen if one in _READ)
        if not read:
            raise ValueError(f'by: "coherence" asks what a neuron reads; expected side "in" or "gate", got {chosen}')
        return read


_READ = ("in", "gate")


def _require(n: int, by: str) -> None:
    require_count("n", n)
    if by not in ORDERS:
        raise ValueError(f"by: expected one of {', '.join(map(repr, ORDERS))}, got {by!r}")


def _q_values(p: Float64[np.ndarray, "side neuron"]) -> Float64[np.ndarray, "side neuron"]:
    from scipy.stats import false_discovery_control

    q, alive = np.full_like(p, np.nan), ~np.isnan(p)
    if alive.any():
        q[alive] = false_discovery_control(p[alive])
    return q


def _named(sides: Sequence[str]) -> str:
    return f"side{'s' if len(sides) > 1 else ''} " + ", ".join(f'"{side}"' for side in sides)
