"""A word through all neurons of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tl_flash.decode import find_neurons
from tl_flash.explore.jobs import Job
from tl_flash.explore.session import Session
from tl_flash.maps import ConceptHits

HITS = 40


def find(session: Session, job: Job, concept: str, ids: Sequence[int] | None) -> None:
    """Find the neurons about a concept, of all of the model's; tells `found`.

    Args:
        session: whose model is searched.
        job: is told.
        concept: a word or a short phrase.
        ids: the tokens to look for in place of the concept's own.

    Raises:
        ValueError: what `find_neurons` refuses.
    """
    key = (concept, None if ids is None else tuple(ids))
    hits = session.found.get(key)
    if hits is None:
        hits = session.found.keep(key, find_neurons(session.weights, concept, tokens=ids, n=HITS))
    job.tell("found", concept=concept, tokens=_tokens(session, hits), hits=[*map(_hit, hits)])


def _tokens(session: Session, hits: ConceptHits) -> list[dict[str, Any]]:
    weights = hits.tokens.values()
    return [session.token(id) | {"weight": weight} for id, weight in zip(hits.table.ids[0], weights, strict=True)]


def _hit(hit: Any) -> dict[str, Any]:
    told = hit._asdict() | {"neuron": str(hit.neuron)}
    return {name: None if value != value else value for name, value in told.items()}
