"""The result of a decode, and the questions that it answers."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tl_flash.maps import frames, search, storage
from tl_flash.maps.hits import Hits
from tl_flash.maps.reading import NeuronReading
from tl_flash.maps.readings import POLES, Readings
from tl_flash.names import NeuronLike, shown_model

if TYPE_CHECKING:
    import pandas as pd


class NeuronMap(Readings):
    """Every decoded neuron's top tokens at both poles, with the statistics of its scores over the vocabulary.

    Its tensors are those of `Readings`. Made by `tl_flash.flash_decode`; frozen.
    """

    def __getitem__(self, neuron: NeuronLike) -> NeuronReading:
        """One neuron, both poles; a zero direction's tokens are "<none>", its numbers NaN.

        Raises:
            KeyError: the map does not hold the neuron.
        """
        row, column = self.place(neuron)
        positive, negative = (
            tuple(search.hit_at(self, (pole, row, column, rank)) for rank in range(self.k)) for pole in POLES
        )
        return NeuronReading(
            neuron=self.neuron(row, column),
            side=self.side,
            score=self.score,
            positive=positive,
            negative=negative,
            norm=float(self.norm[row, column]),
            std=float(self.std[row, column]),
            kurtosis=float(self.kurtosis[row, column]),
            null_z=float(self.null.quantile()[row]) if self.null is not None else float("nan"),
        )

    def find(self, token: str | int, n: int = 10, pole: str = "both", by: str = "z") -> Hits:
        """The neurons whose top tokens hold a token, best first.

        A map keeps k tokens a pole and knows no other; `find_neurons` scores every neuron, on all forms of a word. The
        title of the hits says so where they are fewer than asked for.

        Args:
            token: its exact string, leading space included, or its id.
            n: how many at most.
            pole: "positive", "negative" or "both".
            by: rank by "z", "prob", "write" (|write_z|: how much the neuron writes the token) or "coherence"
                (the smaller of z and |write_z|: it reads the token and writes it).

        Raises:
            ValueError: an unknown token, pole or order, n below 1, or `by="prob"` on a map of cosines.
        """
        return search.find(self, token, n, pole, by)

    def specialised(self, n: int = 50, quantile: float = 0.999, by: str = "z") -> Hits:
        """The most specialised neurons, best first, each by the top token of its better pole.

        A neuron is specialised where a pole's top z-score exceeds the chosen quantile of the null's, layer by layer.

        Args:
            n: how many at most; fewer come where fewer are specialised.
            quantile: of the null.
            by: as in `find`, of the top token.

        Raises:
            ValueError: an unknown order, n below 1, a quantile that the null cannot give, or a map without a null.
        """
        return search.specialised(self, n, quantile, by)

    def n_specialised(self, quantile: float = 0.999) -> int:
        """How many neurons have a pole whose top z-score exceeds the null's quantile."""
        return int(search.beyond_null(self, quantile).any(0).sum())

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a neuron and pole."""
        return frames.to_frame(self)

    def save(self, path: str | Path) -> None:
        """Write the map to one safetensors file, whole or not at all."""
        storage.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> NeuronMap:
        """Read a map that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, altered, no map, or of a newer format.
        """
        return storage.load(cls, path)

    def __repr__(self) -> str:
        source = self.source
        experts = f"{self.n_experts} experts x " if self.n_experts else ""
        text = (
            f"NeuronMap of {shown_model(source.model)} ({source.model_class}): {len(self.layers)} layers x {experts}"
            f"{self.d_mlp // (self.n_experts or 1)} neurons, "
            f'side "{self.side}", score "{self.score}", k={self.k}, d_vocab={self.d_vocab}, fold_ln={source.fold_ln}'
            + (", through a lens" if source.lens else "")
            + (f" ({source.lens_made})" if source.lens_made else "")
        )
        if self.zero.any():
            text += f", {int(self.zero.sum())} zero directions without a reading"
        if self.null is None:
            return text
        count = self.n_specialised()
        return f"{text}; {count} ({count / len(self):.1%}) above the null's 99.9%"

    def _repr_html_(self) -> str:
        table = self.specialised(10)._repr_html_() if self.null is not None else ""
        return f"<p>{escape(repr(self))}</p>{table}"
