"""How few neurons suffice: a token's logit as the first of them alone are kept, and as they alone are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Curve:
    """The score of a prompt by the number of neurons (each at a position) that are kept, or removed.

    Faithfulness is the share of what all of them do to the score that the kept ones do, completeness the share that is
    left when they are removed (Wang et al., arXiv 2211.00593; Marks et al., arXiv 2403.19647). Either may leave 0 to 1,
    and says little where `none` is near `whole`.
    """

    counts: tuple[int, ...]
    """1, 2, 5, 10, ... and all."""
    whole: float
    """The score of the model as it is."""
    none: float
    """With every neuron at its reference."""
    kept: Float[Tensor, " count"]
    """The score where the first are kept, from what is attributed most to what least, with its sign."""
    removed: Float[Tensor, " count"]
    kept_random: Float[Tensor, " count"]
    """By a random order."""
    removed_random: Float[Tensor, " count"]

    def share(self, score: Float[Tensor, " count"]) -> Float[Tensor, " count"]:
        """Scores as shares of the way from `none` to `whole`."""
        return (score.double() - self.none) / (self.whole - self.none)

    @property
    def faithfulness(self) -> Float[Tensor, " count"]:
        """Of the first neurons kept."""
        return self.share(self.kept)

    @property
    def completeness(self) -> Float[Tensor, " count"]:
        """What is left without the first neurons."""
        return self.share(self.removed)

    def suffices(self, share: float = 0.8, *, random: bool = False) -> int:
        """The fewest neurons tried that, kept, give back this share of what all of them do, as do all larger numbers.

        Args:
            share: of the way from all at their references to the model as it is.
            random: in random order.
        """
        short = (self.share(self.kept_random if random else self.kept) < share).nonzero()[:, 0].tolist()
        return self.counts[min(short[-1] + 1, len(self.counts) - 1) if short else 0]

    def areas(self) -> dict[str, float]:
        """The areas under the four curves, over the logarithm of the count, each of width 1."""
        at = torch.tensor(self.counts, dtype=torch.float64).log()
        width = at[-1] if len(at) > 1 else 1.0
        names = ("kept", "removed", "kept_random", "removed_random")
        return {name: float(torch.trapezoid(self.share(getattr(self, name)), at) / width) for name in names}

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a count: count, faithfulness, completeness, and these in random order."""
        import pandas as pd

        columns: dict[str, Any] = {
            "count": self.counts,
            "faithfulness": self.faithfulness,
            "completeness": self.completeness,
            "faithfulness_random": self.share(self.kept_random),
            "completeness_random": self.share(self.removed_random),
        }
        return pd.DataFrame(columns)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        columns = {str(name): column.tolist() for name, column in self.to_frame().items()}
        return {"whole": self.whole, "none": self.none, "areas": self.areas(), **columns}
