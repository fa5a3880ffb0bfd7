"""What a search in a map returns: neurons with the token that each was found by, best first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, overload

from jaxtyping import Int32
from torch import Tensor

from tl_flash.maps.origin import Origin
from tl_flash.names import AnyNeuron

if TYPE_CHECKING:
    import pandas as pd


class Hit(NamedTuple):
    """One token at one pole of one neuron."""

    neuron: AnyNeuron
    pole: str
    """"positive" (x) or "negative" (-x)."""
    rank: int
    """Place among the pole's top tokens, from 0."""
    token: str
    logit: float
    prob: float
    """NaN under the cosine score, which has no probabilities."""
    z: float
    write_z: float
    """The token's z-score in the neuron's own write direction; its sign is that of the hook_post that raises it."""


@dataclass(frozen=True, eq=False)
class Hits(Sequence[Hit]):
    """A sequence of `Hit` that prints as a table and shows itself in a notebook."""

    hits: tuple[Hit, ...]
    ids: Int32[Tensor, "hit k"]
    """The ids of all top tokens at each hit's pole, best first."""
    origin: Origin
    """The decode that they are of."""
    title: str

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> Hits: ...
    def __getitem__(self, index: int | slice) -> Hit | Hits:
        if isinstance(index, slice):
            return replace(self, hits=self.hits[index], ids=self.ids[index])
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def token_id(self, hit: Hit) -> int:
        """The id of a hit's token, which its string may share with others."""
        return int(self.pole_ids(hit)[hit.rank])

    def pole_ids(self, hit: Hit) -> Int32[Tensor, " k"]:
        """The ids of all top tokens at the hit's pole, best first."""
        return self.ids[self._places[hit.neuron, hit.pole]]

    @cached_property
    def _places(self) -> dict[tuple[AnyNeuron, str], int]:
        return {(hit.neuron, hit.pole): at for at, hit in enumerate(self.hits)}

    def coherent(self, quantile: float = 0.999) -> Hits:
        """The neurons that write what they read: |write_z| beyond a quantile of the null's top z-scores.

        Its sign is that of the hook_post that raises the token.

        Args:
            quantile: of the null, layer by layer.

        Raises:
            ValueError: hits of a map of another side than "in" and "gate", a quantile that the null cannot give, or a
                map without a null.

        Example:
            >>> len(flash_decode(model).specialised(20).coherent()) <= 20
            True
        """
        if self.origin.side not in ("in", "gate"):
            raise ValueError(f'coherent: expected labels of side "in" or "gate", got side {self.origin.side!r}')
        bars = self.origin.bars(quantile)
        kept = [at for at, hit in enumerate(self.hits) if abs(hit.write_z) > bars[hit.neuron.layer]]
        return Hits(tuple(self.hits[at] for at in kept), self.ids[kept], self.origin, f"{self.title}, coherent")

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a hit, columns as `Hit`'s fields, the neuron as its name."""
        return to_frame(self.hits)

    def __str__(self) -> str:
        if not self.hits:
            return f"{self.title}: none"
        return f"{self.title}\n{self._table().to_string(index=False)}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from html import escape

        if not self.hits:
            return f"<p>{escape(self.title)}: none</p>"
        return f"<p>{escape(self.title)}</p>{self._table().to_html(index=False, border=0)}"

    def _table(self) -> pd.DataFrame:
        return table(self.hits, self.origin.score)


def to_frame(hits: Sequence[Hit]) -> pd.DataFrame:
    """A pandas frame, a row a hit, the neuron as its name."""
    import pandas as pd

    rows = [{**hit._asdict(), "neuron": str(hit.neuron)} for hit in hits]
    return pd.DataFrame(rows, columns=pd.Index(Hit._fields))


_FORMATS = {"logit": "{:.3g}", "prob": "{:.3g}", "z": "{:.2f}", "write_z": "{:+.2f}"}


def table(hits: Sequence[Hit], score: str) -> pd.DataFrame:
    """The frame for reading: tokens quoted so that spaces show, numbers short; no probabilities of cosines."""
    frame = to_frame(hits).assign(token=[repr(hit.token) for hit in hits])
    for column, format in _FORMATS.items():
        frame[column] = frame[column].map(format.format)
    return frame.drop(columns="prob").rename(columns={"logit": "cosine"}) if score == "cosine" else frame
