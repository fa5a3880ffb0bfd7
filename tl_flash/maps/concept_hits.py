"""The neurons about a concept, best first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tl_flash.maps.ranked import Ranked
from tl_flash.names import AnyNeuron, Neuron, NeuronLike

if TYPE_CHECKING:
    from tl_flash.maps.concept_table import ConceptTable


class ConceptHit(NamedTuple):
    """One neuron about a concept, on one side."""

    neuron: AnyNeuron
    side: str
    """"in", "gate", "out", or "lens": what it writes, carried through a lens."""
    sign: int
    """1 or -1: which way hook_post has to go to raise the concept, by what the neuron writes (through the lens, where
    there is one): the sign of `write_z`, and so that of `z` on the write side."""
    z: float
    """Weighted mean z-score of the concept's tokens on this side; negative where the direction points away."""
    write_z: float
    """The same of what the neuron writes, through the lens where there is one."""
    p_value: float
    """Against shuffled neurons, two-sided: the chance that a direction without structure has as large a |z|."""
    p_tokens: float
    """Against matched tokens, two-sided: the chance that random tokens have, in this very direction."""
    q_value: float
    """Benjamini and Hochberg's of the larger of the two, over all neurons and sides searched."""
    breadth: float
    """How many tokens carry z: (sum of their shares)^2 / sum of their squares; near 1 where one token does it all."""
    token: str
    """The one that adds most to z."""


class Ranges(Protocol):
    """Anything that tells a neuron's largest |hook_post|, as what `activation_stats` gives does."""

    def abs_max_of(self, neuron: NeuronLike) -> float:
        """Of one neuron."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class ConceptHits(Ranked[ConceptHit]):
    """A sequence of `ConceptHit` that prints as a table; `find_neurons` makes it."""

    concept: str
    tokens: dict[str | int, float]
    """The tokens looked for, with their weights, by string (by id, where several print so); edit it and give it back:
    `find_neurons(model, concept, tokens=...)`."""
    title: str
    table: ConceptTable = field(repr=False)
    """All neurons, from which these are the best."""
    columns = ConceptHit._fields
    formats = {
        "sign": "{:+d}",
        "z": "{:+.2f}",
        "write_z": "{:+.2f}",
        "p_value": "{:.2g}",
        "p_tokens": "{:.2g}",
        "q_value": "{:.2g}",
        "breadth": "{:.1f}",
    }

    def clamps(self, dose: float, stats: Ranges) -> dict[Neuron, float]:
        """What to clamp these neurons to so that the concept is raised: a dict that `clamp` takes.

        Each is held at `dose` times its own largest |hook_post|, with the sign of its hit; a neuron found on several
        sides counts once, by its best hit.

        Args:
            dose: 1 is the most that the neuron does by itself on the texts measured; negative lowers the concept.
            stats: what `activation_stats(model, texts)` gives.

        Raises:
            KeyError: a layer that was not measured.
            ValueError: no hits, a neuron of a mixture of experts, or one that writes nothing or whose
                hook_post is 0 on all texts.

        Example:
            >>> hits = find_neurons(model, "dog", n=3)
            >>> len(hits.clamps(2.0, activation_stats(model, ["the dog saw a cat"]))) <= 3
            True
        """
        if not self.hits:
            raise ValueError(f"{self.title}: none, so there is nothing to clamp")
        values: dict[Neuron, float] = {}
        for hit in self.hits:
            neuron = Neuron.of(hit.neuron)
            largest = stats.abs_max_of(neuron)
            if not abs(hit.write_z) > 0:
                raise ValueError(
                    f"{neuron}: it writes nothing along {self.concept!r}, so no sign of a clamp would raise it"
                )
            if largest == 0:
                raise ValueError(f"stats: hook_post of {neuron} is 0 on all texts measured; measure others")
            values.setdefault(neuron, hit.sign * dose * largest)
        return values

    def _head(self) -> list[str]:
        listed = (repr(token) if weight == 1 else f"{token!r} x {weight:g}" for token, weight in self.tokens.items())
        return [self.title, "tokens: " + ", ".join(listed)]
