"""A figure of where a model keeps its concepts."""

from __future__ import annotations

from html import escape

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from tl_flash.maps import ConceptTable
from tl_flash.show.plots import theme as themes


def concepts(table: ConceptTable, *, theme: str = "light") -> go.Figure:
    """Where a model keeps its concepts: by layer the best neuron of each, a panel for each side.

    The colour is the greatest |mean z| of the layer's neurons over the concept's tokens; the hover names the neuron.

    Args:
        table: of `tl_flash.concepts`.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        ValueError: an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> figure = plots.concepts(concepts(model, ["dog", "cat"], sides=["in", "out"]))
        >>> [trace.z.shape for trace in figure.data]
        [(2, 2), (2, 2)]
    """
    themes.require("table", table, ConceptTable)
    colours = themes.of(theme)
    sides = table.sides
    most = max(table.by_layer(side)[0].max() for side in sides)
    panels = make_subplots(
        1, len(sides), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=list(map(_named, sides))
    )
    panels.update_layout(
        template=colours.template(),
        height=max(360, 210 + 22 * len(table.names)),
        coloraxis={
            "colorscale": colours.scale,
            "cmin": 0,
            "cmax": float(most),
            "colorbar": {"title": "best |z|", "thickness": 14},
        },
    )
    themes.titled(
        panels,
        colours,
        "Where the model keeps its concepts",
        f"{escape(table.model)} · greatest |mean z| of each layer's neurons over the tokens of a concept",
    )
    layers = [str(rows.layer) for rows in table.rows]
    names = [escape(name, quote=False) for name in table.names]
    for column, side in enumerate(sides, start=1):
        best, places = table.by_layer(side)
        signed = table.z[:, table.readings.index(side)].gather(1, places)
        neurons = [[str(table.neuron(row)) for row in of_concept] for of_concept in places.tolist()]
        panels.add_heatmap(
            x=layers,
            y=names,
            z=best.numpy(),
            coloraxis="coloraxis",
            customdata=np.stack([np.array(neurons, dtype=object), signed.numpy().round(2)], axis=2),
            hovertemplate="<b>%{customdata[0]}</b><br>concept %{y}<br>mean z %{customdata[1]}<extra></extra>",
            row=1,
            col=column,
        )
    panels.update_yaxes(title_text="concept", row=1, col=1)
    panels.update_xaxes(title_text="layer", type="category")
    return panels.update_yaxes(type="category", autorange="reversed", showgrid=False)


def _named(side: str) -> str:
    return "W_out through the lens" if side == "lens" else f"W_{side}"
