"""Results to one offline HTML page: search a map as one types, read its neurons, compare and check them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_flash import artefacts
from tl_flash.evidence import Explanation, Validation
from tl_flash.maps import Comparison, ConceptHits, ConceptTable, NeuronMap
from tl_flash.show.report import given, pack

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


_SCRIPTS = ("data.js", "search.js", "dom.js", "panel.js", "figures.js", "prompts.js", "list.js", "page.js")


def write(
    map: NeuronMap | Sequence[NeuronMap],
    path: str | Path,
    *,
    compare: Comparison | Sequence[Comparison] | None = None,
    validation: Validation | pd.DataFrame | Sequence[Validation | pd.DataFrame] | None = None,
    concepts: ConceptTable | ConceptHits | Sequence[ConceptTable | ConceptHits] | None = None,
    explanations: Explanation | Sequence[Explanation] | None = None,
    figures: Sequence[go.Figure] | None = None,
    title: str | None = None,
) -> Path:
    """Write the explorer of a map: one HTML file that needs no network and makes no request.

    The page finds neurons by word, token, name or layer, sorts them by z, probability, kurtosis, coherence or what a
    clamp did, and shows each with both poles and its statistics beside the null. The data are little-endian arrays,
    gzipped where that helps: every top z-score in float32, those of the other tokens, write_z and the mean z of
    concepts in 16 bits (steps of the largest over 65,535, or 32,767 where some are negative); probabilities follow from
    the z-scores. Strings of the vocabulary are only ever text; the page runs no script but its own, whose digests its
    security policy names.

    Args:
        map: a map, or several sides of one model.
        path: of the file to write.
        compare: comparisons of these maps with another model's; `compare(map, other)`.
        validation: results of `validate` for these maps, or frames as `Validation.to_frame()` gives them.
        concepts: searches in the same model, of `concepts` or `find_neurons`: asked for one of their concepts, the page
            ranks every neuron by its mean z.
        explanations: of prompts to the same model, by `explain`: the page shows their tokens and the neurons of each,
            which lead to the neurons of the maps.
        figures: to show beside the neurons, those of `tl_flash.plots` in the page's theme; by default the tokens that
            the maps tracked, specialisation, agreement and validation, as far as given. () for none, and a page smaller
            by plotly's 1.9 MB.
        title: of the page; by default the model's name.

    Returns:
        The path written.

    Raises:
        TypeError: an argument of another kind.
        ValueError: maps of several models or twice one side, a comparison, validation, search or explanation of another
            model, a concept that comes twice, or no map.
        FileNotFoundError: no such folder.
        IsADirectoryError: a folder in the page's place.

    Example:
        >>> import tempfile
        >>> from tl_flash import report
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = report.write(flash_decode(model), folder + "/page.html", figures=())
        ...     page.stat().st_size < 100_000
        True
    """
    maps = given.listed(map, NeuronMap, "map")
    comparisons, validations = given.listed(compare, Comparison, "compare"), given.frames(validation)
    given.require_alike(maps)
    by_side = {one.side: one for one in maps}
    for one in comparisons:
        given.require_own(one, by_side)
    compared = [one.a.side for one in comparisons]
    if len(set(compared)) < len(compared):
        raise ValueError(f"compare: expected each side once, got sides {compared}")
    for frame in validations:
        given.require_labels(frame, by_side)
    searched = given.tables(concepts)
    for table in searched:
        given.require_searched(table, maps[0])
    names = [name for table in searched for name in table.names]
    if len(set(names)) < len(names):
        raise ValueError(f"concepts: expected each once, got {names}")
    explained = given.listed(explanations, Explanation, "explanations")
    for one in explained:
        given.require_explained(one, maps[0])
    path = Path(path)
    artefacts.require_place(path, "the page")
    if figures is None:
        figures = _standard_figures(maps, comparisons, given.listed_validations(validation))
    title = title if title is not None else f"What the neurons of {maps[0].source.model} stand for"
    blobs = {"vocab": pack.json_blob([str(name) for name in maps[0].vocab.names])}
    sides = []
    for one in maps:
        comparison = next((c for c in comparisons if c.a.side == one.side), None)
        columns = pack.columns(one, comparison) | pack.concept_columns(one, searched)
        for name, column in columns.items():
            blobs |= {f"{one.side}.{name}.{at}": plane for at, plane in enumerate(column.planes())}
        records = [_jsonable(r) for f in validations for r in f.to_dict("records") if r["side"] == one.side]
        sides.append(_side(one, comparison, records) | {"columns": {n: c.layout() for n, c in columns.items()}})
    scripts = [("explorer", "\n".join(_asset(name) for name in _SCRIPTS))]
    if figures:
        from plotly.offline import get_plotlyjs

        scripts.append(("plotly", get_plotlyjs()))
        blobs |= {"plotly": pack.blob(get_plotlyjs().encode()), "figures": pack.json_blob(_sent(figures))}
    meta = _meta(title, maps[0], sides, len(figures)) | {
        "concepts": _concepts(searched),
        "explanations": [one.to_dict() for one in explained],
    }
    blobs["meta"] = pack.json_blob(meta)
    traces: list[Any] = [trace for figure in figures for trace in figure.data]
    webgl = any(trace.type.endswith("gl") for trace in traces)
    path.write_text(_page(title, scripts, blobs, webgl), encoding="utf-8", newline="\n")
    return path


def _page(title: str, scripts: list[tuple[str, str]], blobs: dict[str, str], webgl: bool) -> str:
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for _, s in scripts)
    compiled = " 'unsafe-eval'" if webgl else ""  # plotly compiles its WebGL drawing with Function()
    parts = {
        "POLICY": f"default-src 'none'; script-src {digests}{compiled}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",
        "TITLE": escape(title),
        "STYLE": _asset("style.css"),
        "DATA": "\n".join(f'<script type="text/plain" data-blob="{escape(n)}">{b}</script>' for n, b in blobs.items()),
        "SCRIPT": scripts[0][1],
    }
    pieces = _asset("page.html").split("%%")
    return "".join(parts[piece] if at % 2 else piece for at, piece in enumerate(pieces))


def _asset(name: str) -> str:
    return resources.files("tl_flash.show.report").joinpath(name).read_text(encoding="utf-8")


def _meta(title: str, map: NeuronMap, sides: list[dict[str, Any]], figures: int) -> dict[str, Any]:
    source = map.source
    return {
        "title": title,
        "model": source.model,
        "layers": list(map.layers),
        "n_layers": map.n_layers,
        "d_mlp": map.d_mlp,
        "n_experts": map.n_experts,
        "k": map.k,
        "d_vocab": map.d_vocab,
        "score": map.score,
        "figures": figures,
        "sides": sides,
        "source": {
            "class": source.model_class,
            "dtype": source.dtype,
            "norms folded in": "yes" if source.fold_ln else "no",
            "precision": source.precision,
            "made with": ", ".join(f"{name} {version}" for name, version in source.versions.items()),
        },
    }


def _concepts(tables: Sequence[ConceptTable]) -> list[dict[str, Any]]:
    """Each concept's name, and its tokens, the heaviest first."""
    return [
        {"name": name, "ids": [id for _, id in sorted(zip((-w for w in weights.tolist()), ids, strict=True))]}
        for table in tables
        for name, ids, weights in zip(table.names, table.ids, table.null.weights, strict=True)
    ]


def _side(map: NeuronMap, comparison: Comparison | None, records: list[dict[str, Any]]) -> dict[str, Any]:
    other = None
    if comparison is not None:
        other = {"model": comparison.b.source.model, "agreement": comparison.agreement, "null": comparison.null}
    return {
        "side": map.side,
        "fingerprint": map.source.fingerprint,
        "lens": map.source.lens is not None,
        "bar": None if map.null is None else [_finite(bar) for bar in map.null.quantile().tolist()],
        "other": other,
        "validated": records,
    }


def _sent(figures: Sequence[go.Figure]) -> dict[str, Any]:
    from tl_flash.show.plots import theme

    return {
        "figures": [json.loads(str(figure.to_json())) for figure in figures],
        "colours": theme.pairs(),
        "templates": {name: look.template().to_plotly_json() for name, look in theme.THEMES.items()},
    }


def _standard_figures(
    maps: Sequence[NeuronMap], comparisons: Sequence[Comparison], validations: Sequence[Validation]
) -> list[go.Figure]:
    from tl_flash.show import plots

    figures = [plots.token_by_layer(map, id) for map in maps if map.score == "dot" for id in map.tracked.ids]
    figures += [plots.specialisation(map) for map in maps]
    figures += [plots.agreement(one, parts=min(10, int(one.compared.sum()))) for one in comparisons]
    return figures + ([plots.validation(*validations)] if validations else [])


def _jsonable(record: dict[Any, Any]) -> dict[str, Any]:
    return {str(name): _finite(value) for name, value in record.items()}


def _finite(value: Any) -> Any:
    return None if value != value else value
