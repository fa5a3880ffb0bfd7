"""Results to one offline HTML page: search a map as one types, read its neurons, compare and check them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_flash import artefacts
from tl_flash.evidence import Explanation, Validation
from tl_flash.maps import Comparison, ConceptHits, ConceptTable, NeuronMap
from tl_flash.names import shown_model
from tl_flash.show.report import contents, given, layout, pack

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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
    title = title if title is not None else f"What the neurons of {shown_model(maps[0].source.model)} stand for"
    blobs, sides = {"vocab": contents.vocabulary(maps[0])}, []
    for one in maps:
        comparison = next((c for c in comparisons if c.a.side == one.side), None)
        records = [record for frame in validations for record in frame.to_dict("records") if record["side"] == one.side]
        told, arrays = contents.side(one, comparison, records, searched)
        blobs |= arrays
        sides.append(told)
    scripts = ["\n".join([*(layout.asset(name) for name in layout.SCRIPTS), "start();"])]
    if figures:
        from plotly.offline import get_plotlyjs

        scripts.append(get_plotlyjs())
        blobs |= {"plotly": pack.blob(get_plotlyjs().encode()), "figures": pack.json_blob(_sent(figures))}
    meta = contents.meta(
        title,
        maps[0],
        sides,
        figures=len(figures),
        concepts=contents.concepts(searched),
        explanations=[one.to_dict() for one in explained],
    )
    blobs["meta"] = pack.json_blob(meta)
    traces: list[Any] = [trace for figure in figures for trace in figure.data]
    webgl = any(trace.type.endswith("gl") for trace in traces)  # plotly compiles its WebGL drawing with Function()
    page = layout.html(title, scripts[0], layout.policy(scripts, compiled=webgl), blobs=blobs)
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


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
