"""What a search in a map returns: neurons with the token that each was found by, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Int32
from torch import Tensor

from tl_flash.maps.origin import Origin
from tl_flash.maps.ranked import Ranked, frame_of, raising_sign, shown
from tl_flash.names import AnyNeuron

if TYPE_CHECKING:
    import pandas as pd


class Hit(NamedTuple):
    """One token at one pole of one neuron."""

    neuron: AnyNeuron
    pole: str
    """"positive" (x) or "negative" (-x)."""
    rank: int
    """Place among the pole's tokens, from 0: how many have a higher score."""
    token: str
    logit: float
    prob: float
    """NaN under the cosine score, which has no probabilities."""
    z: float
    write_z: float
    """The token's z-score in the neuron's own write direction; its sign is that of the hook_post that raises it."""

    @property
    def sign(self) -> int:
        """1 or -1: which way hook_post has to go to raise the token."""
        return raising_sign(self.write_z)


_FORMATS = {"logit": "{:.3g}", "prob": "{:.3g}", "z": "{:.2f}", "write_z": "{:+.2f}"}


@dataclass(frozen=True, eq=False, repr=False)
class Hits(Ranked[Hit]):
    """A sequence of `Hit` that prints as a table and shows itself in a notebook."""

    token_ids: tuple[int, ...]
    """The id of each hit's token, whose string others may share."""
    ids: Int32[Tensor, "hit k"]
    """The ids of all top tokens at each hit's pole, best first."""
    origin: Origin
    """The decode that they are of."""
    title: str
    columns = Hit._fields
    formats = _FORMATS

    def token_id(self, hit: Hit) -> int:
        """The id of a hit's token, which its string may share with others."""
        return self.token_ids[self._places[hit.neuron, hit.pole]]

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
        return self._of(kept, f"{self.title}, coherent")

    def _of(self, kept: Sequence[int], title: str) -> Hits:
        hits, tokens = (tuple(each[at] for at in kept) for each in (self.hits, self.token_ids))
        return replace(self, hits=hits, token_ids=tokens, ids=self.ids[list(kept)], title=title)

    def _part(self, which: slice) -> Hits:
        return self._of(range(len(self.hits))[which], self.title)

    def _head(self) -> list[str]:
        return [self.title]

    def _table(self) -> pd.DataFrame:
        return table(self.hits, self.origin.score)


def table(hits: Sequence[Hit], score: str) -> pd.DataFrame:
    """The frame for reading, without probabilities of cosines."""
    frame = shown(frame_of(hits, Hit._fields), _FORMATS)
    return frame.drop(columns="prob").rename(columns={"logit": "cosine"}) if score == "cosine" else frame
