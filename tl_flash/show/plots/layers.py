"""Figures by layer: how specialised its neurons are, and how many of them another model keeps."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from tl_flash.maps import Comparison, NeuronMap
from tl_flash.show.plots import theme as themes
from tl_flash.show.plots.names import model_of, named, reading_of
from tl_flash.show.plots.theme import Theme, all_quoted

_FENCES = (0.01, 0.25, 0.5, 0.75, 0.99)
_TOP = 5
"""Neurons drawn above each box."""


def specialisation(neurons: NeuronMap, *, theme: str = "light") -> go.Figure:
    """How specialised each layer is: top z-scores (of both poles) and excess kurtosis, beside the null's.

    Boxes hold the middle half, whiskers reach from 1% to 99%; above them stand the five largest of the layer.

    Args:
        neurons: a map, with or without a null.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        ValueError: an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> plots.specialisation(flash_decode(model)).layout.yaxis.title.text
        'top z-score of a pole'
    """
    themes.require("neurons", neurons, NeuronMap)
    colours = themes.of(theme)
    panels = make_subplots(1, 2, horizontal_spacing=0.1)
    panels.update_layout(template=colours.template(), boxmode="group", boxgap=0.35, boxgroupgap=0.25)
    share = ""
    if neurons.null is not None:
        count = neurons.n_specialised()
        share = f" · {count:,} of {len(neurons):,} neurons ({count / len(neurons):.1%}) beyond the null's 99.9% by z"
    themes.titled(
        panels,
        colours,
        "How specialised each layer's neurons are",
        f"{reading_of(neurons.origin)}{share}",
    )
    z = torch.cat([neurons.positive.z[..., 0], neurons.negative.z[..., 0]], dim=1)
    ids = torch.cat([neurons.positive.ids[..., 0], neurons.negative.ids[..., 0]], dim=1)
    strongest = torch.where(
        neurons.positive.z[..., 0] >= neurons.negative.z[..., 0],
        neurons.positive.ids[..., 0],
        neurons.negative.ids[..., 0],
    )
    null = (None, None) if neurons.null is None else (neurons.null.z, neurons.null.kurtosis)
    for column, (values, tokens, draws, name) in enumerate(
        ((z, ids, null[0], "top z-score of a pole"), (neurons.kurtosis, strongest, null[1], "excess kurtosis")), start=1
    ):
        if draws is not None:
            panels.add_trace(_boxes(neurons, draws, "null", colours.grey, column), 1, column)
        panels.add_trace(_boxes(neurons, values, "neurons", colours.blue, column), 1, column)
        panels.add_trace(_largest(neurons, values, tokens, name, colours), 1, column)
        panels.update_yaxes(title_text=name, row=1, col=column)
        panels.update_xaxes(title_text="layer", tickvals=list(neurons.layers), row=1, col=column)
    return panels


def _boxes(neurons: NeuronMap, values: torch.Tensor, name: str, colour: str, column: int) -> go.Box:
    low, q1, median, q3, high = torch.nanquantile(values.double(), torch.tensor(_FENCES, dtype=torch.float64), dim=1)
    return go.Box(
        x=list(neurons.layers),
        lowerfence=low.tolist(),
        q1=q1.tolist(),
        median=median.tolist(),
        q3=q3.tolist(),
        upperfence=high.tolist(),
        name=name,
        offsetgroup=name,
        legendgroup=name,
        showlegend=column == 1,
        fillcolor=themes.faint(colour, 0x44),
        line={"color": colour, "width": 1.5},
        hoverinfo="y+name",
    )


def _largest(neurons: NeuronMap, values: torch.Tensor, tokens: torch.Tensor, name: str, colours: Theme) -> go.Scatter:
    top, places = values.nan_to_num(nan=-torch.inf).topk(min(_TOP, values.shape[1]), dim=1)
    top = top.masked_fill(top.isinf(), torch.nan)  # of zero directions, which are not drawn
    layers = np.repeat(neurons.layers, top.shape[1])
    rows = np.repeat(np.arange(len(places)), places.shape[1])
    columns = places.flatten().numpy() % neurons.d_mlp
    template, names = named(map(neurons.neuron, rows.tolist(), columns.tolist()), experts=neurons.n_experts is not None)
    return go.Scatter(
        x=layers + (0.16 if neurons.null is not None else 0.0),
        y=top.flatten().numpy(),
        mode="markers",
        name="largest",
        showlegend=False,
        marker={"size": 5, "color": colours.blue},
        customdata=np.stack([layers, columns], axis=1),
        text=all_quoted(neurons.vocab.names[tokens.gather(1, places).flatten().numpy()]),
        hovertemplate=f"{template}<br>token %{{text}}<br>{name} %{{y:.2f}}<extra></extra>",
        **names,
    )


def agreement(comparison: Comparison, *, parts: int = 10, theme: str = "light") -> go.Figure:
    """Share of neurons that keep their top token: by layer with its null, and by how specialised they are in a.

    Args:
        comparison: of two maps.
        parts: equal parts of the neurons, ordered by their top z-score in a.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        ValueError: an unknown theme, or fewer neurons than parts.

    Example:
        >>> from tl_flash import plots
        >>> neurons = flash_decode(model)
        >>> list(plots.agreement(compare(neurons, neurons)).data[0].y)
        [1.0, 1.0]
    """
    themes.require("comparison", comparison, Comparison)
    colours = themes.of(theme)
    panels = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.06)
    panels.update_layout(template=colours.template(), bargap=0.3, bargroupgap=0.08)
    a, b = (model_of(map.source) for map in (comparison.a, comparison.b))
    themes.titled(
        panels,
        colours,
        f"{comparison.agreement:.1%} of neurons keep their top token from {a} to {b}",
        f'{int(comparison.compared.sum()):,} neurons, side "{comparison.a.side}" · '
        f"{comparison.null:.1%} if shuffled within their layers",
    )
    for name, values, colour in (
        ("same top token", comparison.by_layer, colours.blue),
        ("shuffled within the layer", comparison.null_by_layer, colours.grey),
    ):
        panels.add_bar(
            x=list(comparison.a.layers),
            y=values.tolist(),
            name=name,
            marker_color=colour,
            hovertemplate=f"layer %{{x}}<br>{name} %{{y:.1%}}<extra></extra>",
            row=1,
            col=1,
        )
    part = comparison.by_specialisation(parts)
    panels.add_scatter(
        x=(part["z_from"] + part["z_to"]) / 2,
        y=part["agreement"],
        error_x={"array": (part["z_to"] - part["z_from"]) / 2, "color": colours.blue, "thickness": 1, "width": 0},
        mode="markers",
        marker={"color": colours.blue, "size": 9},
        customdata=part[["z_from", "z_to", "neurons"]],
        hovertemplate=(
            "top z %{customdata[0]:.2f} to %{customdata[1]:.2f}<br>%{customdata[2]:,} neurons"
            "<br>same top token %{y:.1%}<extra></extra>"
        ),
        showlegend=False,
        row=1,
        col=2,
    )
    panels.update_yaxes(tickformat=".0%", range=[0, 1.02])
    panels.update_yaxes(title_text="share of neurons", row=1, col=1)
    panels.update_xaxes(title_text="layer", tickvals=list(comparison.a.layers), row=1, col=1)
    return panels.update_xaxes(title_text=f"top z-score in {a} (bars: {parts} equal parts)", row=1, col=2)


def changed(comparison: Comparison, *, theme: str = "light") -> go.Figure:
    """Where the neurons with another top token sit: layer against top z-score in a, the others behind them.

    Args:
        comparison: of two maps.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        ValueError: an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> neurons = flash_decode(model)
        >>> [len(trace.x) for trace in plots.changed(compare(neurons, neurons)).data]
        [104, 0]
    """
    themes.require("comparison", comparison, Comparison)
    colours = themes.of(theme)
    a, b = comparison.a, comparison.b
    differ = comparison.compared & ~comparison.same_top
    count = int(differ.sum())
    figure = themes.figure(
        colours,
        f"Where neurons change their top token from {model_of(a.source)} to {model_of(b.source)}",
        f'{count:,} of {int(comparison.compared.sum()):,} neurons changed, side "{a.side}"',
        "layer",
        f"top z-score in {model_of(a.source)}",
    )
    z = a.positive.z[..., 0].numpy()
    probs = a.positive.probs[..., 0].numpy() if a.score == "dot" else np.full_like(z, np.nan)
    for part, name, colour, opacity in (
        (comparison.same_top.numpy(), "same top token", colours.grey, 0.4),
        (differ.numpy(), "another top token", colours.orange, 0.8),
    ):
        row, index = part.nonzero()
        layer = np.asarray(a.layers)[row]
        template, names = named(map(a.neuron, row.tolist(), index.tolist()), experts=a.n_experts is not None)
        before, after = (all_quoted(map.vocab.names[map.positive.ids[..., 0].numpy()[part]]) for map in (a, b))
        text = before if name == "same top token" else [f"{x} → {y}" for x, y in zip(before, after, strict=True)]
        figure.add_trace(
            go.Scattergl(
                x=(layer + 0.8 * (index / a.d_mlp - 0.5)).astype(np.float32),
                y=z[part],
                name=name,
                mode="markers",
                marker={"size": 5, "color": colour, "opacity": opacity},
                customdata=np.stack([layer, index, probs[part]], axis=1).astype(np.float32),
                text=text,
                hovertemplate=(
                    f"{template}<br>top token %{{text}}<br>z %{{y:.2f}}"
                    "<br>probability %{customdata[2]:.3g}<extra></extra>"
                ),
                **names,
            )
        )
    return figure.update_xaxes(tickvals=list(a.layers))
