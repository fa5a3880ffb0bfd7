"""One neuron of a map: both poles' top tokens, as text and in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from tl_flash.maps.hits import Hit, table
from tl_flash.maps.ranked import frame_of
from tl_flash.names import AnyNeuron

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class NeuronReading:
    """What one neuron's weights say on one side, read at both poles."""

    neuron: AnyNeuron
    side: str
    score: str
    positive: tuple[Hit, ...]
    """The tokens that the direction points to most, best first."""
    negative: tuple[Hit, ...]
    """The tokens that it points away from most: the top of its opposite."""
    norm: float
    std: float
    kurtosis: float
    null_z: float
    """The top z-score that 99.9% of shuffled directions of the layer stay under; NaN without a null."""

    @property
    def specialised(self) -> bool:
        """Whether a pole's top z-score exceeds `null_z`."""
        return max(self.positive[0].z, self.negative[0].z) > self.null_z

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a token and pole."""
        return frame_of(self.positive + self.negative, Hit._fields)

    def __str__(self) -> str:
        positive, negative = self._table(self.positive), self._table(self.negative)
        return (
            f"{self._heading()}\n"
            f"positive pole (x)\n{positive.to_string(index=False)}\n"
            f"negative pole (-x)\n{negative.to_string(index=False)}"
        )

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<td style='vertical-align:top;text-align:left'>{title}"
            f"{self._table(hits).to_html(index=False, border=0)}</td>"
            for hits, title in ((self.positive, "positive pole (x)"), (self.negative, "negative pole (-x)"))
        )
        return f"<p>{escape(self._heading())}</p><table><tr>{cells}</tr></table>"

    def _heading(self) -> str:
        if self.norm == 0:
            return f'{self.neuron}, side "{self.side}": a zero direction, which has no reading'
        verdict = "specialised" if self.specialised else "not specialised"
        null = f"; {verdict} (null's 99.9%: z {self.null_z:.2f})" if self.null_z == self.null_z else ""
        return f'{self.neuron}, side "{self.side}": norm {self.norm:.3g}, kurtosis {self.kurtosis:.2f}{null}'

    def _table(self, hits: tuple[Hit, ...]) -> pd.DataFrame:
        return table(hits, self.score).drop(columns=["neuron", "pole", "rank"])
