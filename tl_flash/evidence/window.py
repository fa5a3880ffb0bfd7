"""What a model writes at rising doses of a clamp, and between which doses the clamp shows and the text reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from tl_flash.names import Neuron

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class DoseWindow:
    """What a model writes at rising doses of a clamp. Dose 0 is the unclamped model."""

    units: dict[Neuron, float]
    """What each neuron is clamped by at dose 1."""
    looked_for: str
    doses: Float[Tensor, " dose"]
    """Rising, from 0."""
    completions: tuple[tuple[str, ...], ...]
    """By dose and prompt."""
    shows: Bool[Tensor, "dose prompt"]
    """Whether the completion speaks of what is looked for."""
    perplexity: Float[Tensor, "dose prompt"]
    """Of the completion, by the unclamped model."""
    distinct: Float[Tensor, "dose prompt"]
    """Share of its bigrams that are not repeated."""
    share: float
    most_perplexity: float
    least_distinct: float

    @property
    def share_shown(self) -> Float[Tensor, " dose"]:
        """Share of the completions that speak of it."""
        return self.shows.double().mean(1)

    @property
    def perplexity_ratio(self) -> Float[Tensor, " dose"]:
        """Geometric mean perplexity over that of the unclamped model's own completions."""
        nats = self.perplexity.double().log().nanmean(1)
        return (nats - nats[0]).exp()

    @property
    def distinct_ratio(self) -> Float[Tensor, " dose"]:
        """Mean share of distinct bigrams over that of the unclamped model's own."""
        mean = self.distinct.double().mean(1)
        return mean / mean[0]

    @property
    def reads(self) -> Bool[Tensor, " dose"]:
        """Where the text still reads: neither too unlikely nor too repetitive."""
        return (self.perplexity_ratio <= self.most_perplexity) & (self.distinct_ratio >= self.least_distinct)

    @property
    def low(self) -> float | None:
        """The smallest dose tried at which it shows; None where it never does, or does without a clamp."""
        shown = self.share_shown >= self.share
        return None if shown[0] else self._first(shown)

    @property
    def high(self) -> float | None:
        """The largest dose tried up to which the text reads; None where it reads at none."""
        broken = (~self.reads[1:]).nonzero()[:, 0]
        last = int(broken[0]) if len(broken) else len(self.doses) - 1
        return float(self.doses[last]) if last else None

    @property
    def open(self) -> bool:
        """Whether there is a dose at which it shows and the text reads."""
        return self.low is not None and self.high is not None and self.low <= self.high

    def clamps(self, dose: float | None = None) -> dict[Neuron, float]:
        """What to clamp: every neuron at a dose, by default the smallest at which it shows.

        Raises:
            ValueError: no dose is given and it never shows, or shows without a clamp.
        """
        if dose is None:
            dose = self.low
        if dose is None and self.share_shown[0] >= self.share:
            raise ValueError(
                f"dose: {self.looked_for!r} shows in {float(self.share_shown[0]):.0%} of the completions without a "
                "clamp, so none can be told to show it; give other prompts, or a dose"
            )
        if dose is None:
            raise ValueError(
                f"dose: {self.looked_for!r} shows in {self.share:.0%} of the completions at no dose up to "
                f"{float(self.doses[-1]):.3g}; give other neurons, a larger dose, or a smaller share="
            )
        return {neuron: dose * unit for neuron, unit in self.units.items()}

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a dose: dose, share_shown, perplexity_ratio, distinct_ratio, reads."""
        import pandas as pd

        names = ("doses", "share_shown", "perplexity_ratio", "distinct_ratio", "reads")
        columns = {name: getattr(self, name).numpy() for name in names}
        return pd.DataFrame(columns).rename(columns={"doses": "dose"})

    def __str__(self) -> str:
        return f"{self!r}\n{self.to_frame().to_string(index=False, float_format='{:.3g}'.format)}"

    def __repr__(self) -> str:
        named = ", ".join(map(str, self.units)) if len(self.units) <= 3 else f"{len(self.units)} neurons"
        shown = "shows at no dose" if self.low is None else f"shows from {self.low:.3g} units"
        if self.share_shown[0] >= self.share:
            shown = "shows without a clamp"
        reads = "reads at no dose" if self.high is None else f"reads up to {self.high:.3g} units"
        return f"{self.looked_for!r} by {named}: {shown}, the text {reads}"

    def _first(self, where: Bool[Tensor, " dose"]) -> float | None:
        found = where[1:].nonzero()[:, 0]
        return float(self.doses[1:][found[0]]) if len(found) else None
