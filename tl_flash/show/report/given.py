"""What `write` takes, listed, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tl_flash.evidence import COLUMNS, Explanation, Validation
from tl_flash.maps import Comparison, ConceptHits, ConceptTable, NeuronMap

if TYPE_CHECKING:
    import pandas as pd


T = TypeVar("T")


def listed(given: T | Sequence[T] | None, kind: type[T], name: str) -> list[T]:
    """One or several of a kind, as a list; TypeError where they are of another."""
    listed = [] if given is None else [given] if isinstance(given, kind) else given
    if not isinstance(listed, Sequence) or not all(isinstance(one, kind) for one in listed):
        raise TypeError(f"{name}: expected a {kind.__name__} or a list of them, got {type(given).__name__}")
    return list(listed)


def listed_validations(given: Any) -> list[Validation]:
    """The Validations among what was given; a frame has no controls to draw."""
    listed = given if isinstance(given, Sequence) else [given]
    return [one for one in listed if isinstance(one, Validation)]


def tables(given: Any) -> list[ConceptTable]:
    """Searches for concepts, each with all neurons, whether they are given as tables or by their hits."""
    listed = [] if given is None else [given] if isinstance(given, ConceptTable | ConceptHits) else list(given)
    for one in listed:
        if not isinstance(one, ConceptTable | ConceptHits):
            raise TypeError(f"concepts: expected what concepts or find_neurons gives, got {type(one).__name__}")
    return [one.table if isinstance(one, ConceptHits) else one for one in listed]


def frames(given: Any) -> list[pd.DataFrame]:
    """Validations as frames, with all their columns."""
    import pandas as pd

    listed = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    frames = []
    for one in listed:
        frame = one.to_frame() if isinstance(one, Validation) else one
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(f"validation: expected a Validation or its frame, got {type(one).__name__}")
        missing = [column for column in COLUMNS if column not in frame]
        if missing:
            raise ValueError(f"validation: expected the columns of Validation.to_frame(), {', '.join(missing)} missing")
        frames.append(frame)
    return frames


def require_alike(maps: Sequence[NeuronMap]) -> None:
    """Refuse maps that are not sides of one model."""
    if not maps:
        raise ValueError("map: expected at least one NeuronMap, got none")
    sides = [map.side for map in maps]
    if len(set(sides)) < len(sides):
        raise ValueError(f"map: expected each side once, got sides {sides}")
    first = maps[0]
    for map in maps[1:]:
        for what in ("layers", "d_mlp", "k", "d_vocab", "score"):
            if getattr(map, what) != getattr(first, what):
                raise ValueError(
                    f'map: expected sides of one model; {what} is {getattr(first, what)} on side "{first.side}" and '
                    f'{getattr(map, what)} on side "{map.side}"'
                )
        if map.source.model != first.source.model or not np.array_equal(map.vocab.names, first.vocab.names):
            raise ValueError(f"map: expected sides of one model, got {first.source.model} and {map.source.model}")


def require_own(comparison: Comparison, by_side: dict[str, NeuronMap]) -> None:
    """Refuse a comparison whose first map is not among those shown."""
    map, a = by_side.get(comparison.a.side), comparison.a
    if map is None or map.source.fingerprint != a.source.fingerprint or not map.positive.ids.equal(a.positive.ids):
        raise ValueError(
            f'compare: expected comparisons whose first map is one of those shown, got one of {a.source.model}, side "'
            f'{a.side}"; make it with compare(map, other)'
        )


def require_searched(table: ConceptTable, map: NeuronMap) -> None:
    """Refuse a search in another model, or in other layers of it, than the maps are of."""
    rows = [(rows.layer, rows.size) for rows in table.rows]
    if table.model != map.source.model or not np.array_equal(table.vocab.names, map.vocab.names):
        raise ValueError(f"concepts: expected a search in {map.source.model}, got one in {table.model}")
    if rows != [(layer, map.d_mlp) for layer in map.layers]:
        raise ValueError(
            f"concepts: expected a search in layers {list(map.layers)} of {map.d_mlp} neurons, as the maps hold them, "
            f"got layers and neurons {rows}"
        )


def require_explained(explanation: Explanation, map: NeuronMap) -> None:
    """Refuse an explanation of another model, or of neurons that the maps do not hold."""
    token = map.vocab.string(explanation.token_id) if explanation.token_id < map.d_vocab else None
    held = all(one.neuron.layer in map.layers and one.neuron.index < map.d_mlp for one in explanation)
    if explanation.model != map.source.model or token != explanation.token or not held:
        raise ValueError(
            f"explanations: expected prompts to {map.source.model} and neurons of layers {list(map.layers)}, as the "
            f"maps hold them, got {explanation!r}"
        )


def require_labels(frame: pd.DataFrame, by_side: dict[str, NeuronMap]) -> None:
    """Refuse a validation whose labels the maps do not hold."""
    for side, name, pole, token in zip(*(frame[c] for c in ("side", "neuron", "pole", "token")), strict=True):
        map = by_side.get(side)
        if map is None:
            raise ValueError(f'validation: expected side {" or ".join(map_side for map_side in by_side)}, got "{side}"')
        top = getattr(map, pole)
        if token not in [map.vocab.string(id) for id in top.ids[map.place(name)].tolist()]:
            raise ValueError(f"validation: {token!r} is no {pole} top token of {name} in the map; validate this map")
