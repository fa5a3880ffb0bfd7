"""Where results come from: the model and how it was read, said once for a map and for whatever is found in it."""

from __future__ import annotations

from dataclasses import dataclass

from tl_flash.maps.later import Later
from tl_flash.maps.null import Null
from tl_flash.vocab import Vocab


@dataclass(frozen=True)
class Source:
    """Where a map comes from."""

    model: str
    model_class: str
    fingerprint: str
    """Digest of the weights decoded, as the model held them; or what makes it, when it is first asked for."""
    dtype: str
    fold_ln: bool
    lens: str | None
    """Digest of the Jacobian lens that what is written was carried through, if one was."""
    center_unembed: bool
    """Whether W_U came without its vocabulary mean; no logit or probability can see it, but cosines do."""
    precision: str
    repaired: int
    """Rows whose first screening did not prove their top tokens, so that they were done again."""
    versions: dict[str, str]
    final_norm: bool = True
    """Whether a norm comes before the unembedding; without one tau = 1, and probabilities see a direction's length."""
    lens_made: str | None = None
    """How that lens was made: the method, and of how many texts."""
    stored: str | None = None
    """Format and quantisation of the checkpoint, such as "GGUF Q4_K and Q6_K"; None of plain numbers."""


Later.attach(Source, "fingerprint")


@dataclass(frozen=True, eq=False)
class Origin:
    """The decode that results are of."""

    side: str
    score: str
    layers: tuple[int, ...]
    n_experts: int | None
    source: Source
    vocab: Vocab
    null: Null | None

    @property
    def reading(self) -> str:
        """What of the neurons was read, in words."""
        return f'side "{self.side}"{"" if self.source.lens is None else ", through a lens"}'

    def bars(self, quantile: float = 0.999) -> dict[int, float]:
        """By layer, the top z-score that this share of its null stays under.

        Raises:
            ValueError: no null, or a share that it cannot give.
        """
        if self.null is None:
            raise ValueError("this map has no null to compare with: its directions were too few to shuffle")
        return dict(zip(self.layers, self.null.quantile(quantile).tolist(), strict=True))
