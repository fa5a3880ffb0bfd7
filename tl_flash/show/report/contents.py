"""What an explorer is told of maps: what they are, and their arrays by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tl_flash.maps import Comparison, ConceptTable, NeuronMap
from tl_flash.names import shown_model
from tl_flash.show.report import pack


def vocabulary(map: NeuronMap) -> str:
    """The strings of all tokens, as the page unpacks them."""
    return pack.json_blob([str(name) for name in map.vocab.names])


def side(
    map: NeuronMap,
    comparison: Comparison | None = None,
    records: Sequence[dict[str, Any]] = (),
    tables: Sequence[ConceptTable] = (),
) -> tuple[dict[str, Any], dict[str, str]]:
    """What one side of a model is, and its arrays, under names that begin with the side's.

    Args:
        map: of the side.
        comparison: of this map with another.
        records: what clamps did to its neurons, as `Validation.to_frame()` has it.
        tables: searches of which the page gets every neuron's mean z on this side.
    """
    columns = pack.columns(map, comparison) | pack.concept_columns(map, tables)
    blobs = {
        f"{map.side}.{name}.{at}": plane for name, column in columns.items() for at, plane in enumerate(column.planes())
    }
    other = None
    if comparison is not None:
        other = {
            "model": shown_model(comparison.b.source.model),
            "agreement": comparison.agreement,
            "null": comparison.null,
        }
    told = {
        "side": map.side,
        "fingerprint": map.source.fingerprint,
        "lens": map.source.lens is not None,
        "bar": None if map.null is None else [_finite(bar) for bar in map.null.quantile().tolist()],
        "other": other,
        "validated": [jsonable(record) for record in records],
        "columns": {name: column.layout() for name, column in columns.items()},
    }
    return told, blobs


def meta(title: str, map: NeuronMap, sides: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What the model and its maps are, with the sides as `side` tells them."""
    source = map.source
    return {
        "title": title,
        "model": shown_model(source.model),
        "layers": list(map.layers),
        "n_layers": map.n_layers,
        "d_mlp": map.d_mlp,
        "n_experts": map.n_experts,
        "k": map.k,
        "d_vocab": map.d_vocab,
        "score": map.score,
        "sides": list(sides),
        "source": {
            "class": source.model_class,
            "dtype": source.dtype,
            "norms folded in": "yes" if source.fold_ln else "no",
            "precision": source.precision,
            "made with": ", ".join(f"{name} {version}" for name, version in source.versions.items()),
        },
        "figures": 0,
        "concepts": [],
        "explanations": [],
    } | more


def concepts(tables: Sequence[ConceptTable]) -> list[dict[str, Any]]:
    """Each concept's name, and its tokens, the heaviest first."""
    return [
        {"name": name, "ids": [id for _, id in sorted(zip((-w for w in weights.tolist()), ids, strict=True))]}
        for table in tables
        for name, ids, weights in zip(table.names, table.ids, table.null.weights, strict=True)
    ]


def jsonable(record: dict[Any, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null stands for what does not exist."""
    return {str(name): _finite(value) for name, value in record.items()}


def _finite(value: Any) -> Any:
    return None if value != value else value
