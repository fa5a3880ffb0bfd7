"""Results to plotly figures; each function returns a go.Figure and shows nothing."""

from __future__ import annotations

import plotly.graph_objects as go

from tl_flash.compare import Comparison
from tl_flash.experiments import DoseCurve
from tl_flash.neuron_map import NeuronMap

# Okabe and Ito's palette, told apart by readers of every colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY)


def token_by_layer(neurons: NeuronMap, token: str | int) -> go.Figure:
    """The probability of one token for every neuron, layer by layer (Davies 2025's picture of " dog").

    Args:
        neurons: a map that tracked the token: `flash_decode(model, tokens=[" dog"])`.
        token: its string or id.

    Raises:
        KeyError: the token was not tracked.
        ValueError: the map is of cosines.
    """
    probs = neurons.tracked_probs(token)
    name = neurons.vocab.string(neurons.vocab.id(token))
    layers = [layer for layer in neurons.layers for _ in range(neurons.d_mlp)]
    indices = list(range(neurons.d_mlp)) * len(neurons.layers)
    spread = [layer + 0.8 * (index / neurons.d_mlp - 0.5) for layer, index in zip(layers, indices, strict=True)]
    label = [f"L{layer}N{index}" for layer, index in zip(layers, indices, strict=True)]
    top = [str(tokens[0]) for row in neurons.positive.strings for tokens in row]
    figure = _figure(
        f'Probability of {name!r} for each neuron of {neurons.source.model}, side "{neurons.side}"',
        "layer",
        f"probability of {name!r}",
    )
    figure.add_trace(
        go.Scattergl(
            x=spread,
            y=probs.flatten().tolist(),
            mode="markers",
            marker={"size": 5, "color": BLUE, "opacity": 0.6},
            customdata=list(zip(label, map(repr, top), neurons.positive.z[..., 0].flatten().tolist(), strict=True)),
            hovertemplate=(
                "%{customdata[0]}<br>probability %{y:.3g}<br>top token %{customdata[1]}"
                "<br>top z %{customdata[2]:.1f}<extra></extra>"
            ),
        )
    )
    return figure.update_layout(showlegend=False).update_xaxes(dtick=1)


def dose_curve(curve: DoseCurve) -> go.Figure:
    """Mean probability of each token as the neuron is clamped, with its 95% band over the prompts."""
    records = curve.to_frame().to_dict("records")
    figure = _figure(
        f"Clamping {curve.neuron}: probability of the next token", "hook_post set to", "probability (mean over prompts)"
    )
    for token, colour in zip(curve.tokens, PALETTE * (1 + len(curve.tokens) // len(PALETTE)), strict=False):
        unclamped, *clamped = (record for record in records if record["token"] == token)
        clamped.sort(key=lambda record: record["value"])
        values = [record["value"] for record in clamped]
        band = [record["prob_high"] for record in clamped] + [record["prob_low"] for record in reversed(clamped)]
        figure.add_scatter(
            x=values + values[::-1],
            y=band,
            mode="lines",
            fill="toself",
            fillcolor=_faint(colour),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(
            x=values,
            y=[record["prob"] for record in clamped],
            mode="lines+markers",
            name=repr(token),
            line={"color": colour},
            customdata=[record["rank"] for record in clamped],
            hovertemplate=(
                f"{token!r}<br>hook_post %{{x:.3g}}<br>probability %{{y:.3g}}"
                "<br>median rank %{customdata:.0f}<extra></extra>"
            ),
        )
        figure.add_hline(y=unclamped["prob"], line={"color": colour, "dash": "dot", "width": 1})
    return figure.update_yaxes(rangemode="tozero").update_layout(showlegend=True)


def agreement(comparison: Comparison) -> go.Figure:
    """Share of neurons that keep their top token, layer by layer, with the share that shuffled neurons would."""
    layers = list(comparison.a.layers)
    figure = _figure(
        f"Neurons with the same top token: {comparison.a.source.model} and {comparison.b.source.model}, "
        f'side "{comparison.a.side}"',
        "layer",
        "share of neurons",
    )
    for name, values, colour in (
        (f"same top token ({comparison.agreement:.1%})", comparison.by_layer, BLUE),
        (f"shuffled within the layer ({comparison.null:.1%})", comparison.null_by_layer, GREY),
    ):
        figure.add_bar(
            x=layers,
            y=values.tolist(),
            name=name,
            marker_color=colour,
            hovertemplate="layer %{x}<br>%{y:.1%}<extra></extra>",
        )
    return figure.update_layout(barmode="group").update_xaxes(dtick=1).update_yaxes(tickformat=".0%", range=[0, 1])


def _figure(title: str, x: str, y: str) -> go.Figure:
    figure = go.Figure(layout={"template": "plotly_white", "title": {"text": title}, "font": {"size": 14}})
    figure.update_layout(
        margin={"l": 70, "r": 30, "t": 90, "b": 60},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
    return figure.update_xaxes(title=x, zeroline=False).update_yaxes(title=y, zeroline=False)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"
