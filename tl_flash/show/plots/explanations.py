"""A figure of the neurons that made a model predict a token."""

from __future__ import annotations

import math
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_flash.evidence import Curve, ExplainedNeuron, Explanation
from tl_flash.names import shown_model
from tl_flash.show.plots import theme as themes
from tl_flash.show.plots.theme import Theme, all_quoted, quoted

_LABELLED = 8
_LARGEST = 30
"""Of the dots, in pixels."""
_CROWDED = 0.09
"""Of the layers: labels need so much room."""
_APART = 0.16
"""Between dots of one place, in positions."""


def explanation(explanation: Explanation, *, theme: str = "light") -> go.Figure:
    """Which neurons made a model predict a token: position by layer, and how few suffice.

    A dot is a neuron, its area what setting it to its reference changes, or where nothing was measured its attribution;
    the strongest bear what they write. Beside it the curves of faithfulness and completeness, where they were measured.

    Args:
        explanation: of `tl_flash.explain`.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        ValueError: an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> figure = plots.explanation(explain(model, "the dog saw a cat", n=5, measure=False))
        >>> sum(len(trace.x) for trace in figure.data)
        5
    """
    themes.require("explanation", explanation, Explanation)
    colours, curve = themes.of(theme), explanation.curve
    panels = make_subplots(1, 1 if curve is None else 2, column_widths=None if curve is None else [0.64, 0.36])
    panels.update_layout(template=colours.template(), height=520, width=1180 if curve is not None else 800)
    measured = "dots: measured, neurons set to" if curve is not None else "dots: attributed, against"
    reference = "zero" if explanation.reference == "zero" else "their means"
    beside = "" if explanation.against is None else f" and not {quoted(explanation.against)}"
    themes.titled(
        panels,
        colours,
        f"What made {escape(shown_model(explanation.model))} say {quoted(explanation.token)}{beside}",
        f"{measured} {reference} · labelled by the token that they write",
    )
    _dots(panels, explanation, colours)
    if curve is not None:
        _curves(panels, curve, colours)
    return panels


def strength(one: ExplainedNeuron) -> float:
    """What a neuron gives to the score: measured, or else to first order."""
    return one.attribution if math.isnan(one.effect) else -one.effect


def _dots(panels: go.Figure, explanation: Explanation, colours: Theme) -> None:
    most = max(abs(strength(one)) for one in explanation) or 1.0
    places: dict[tuple[int, int], int] = {}
    groups: dict[bool, list[tuple[float, ExplainedNeuron]]] = {True: [], False: []}
    labels: list[tuple[float, ExplainedNeuron]] = []
    for rank, one in enumerate(explanation):
        place = (one.neuron.layer, one.position)
        nth = places[place] = places.get(place, -1) + 1
        x = one.position + _APART * ((nth + 1) // 2) * (1 if nth % 2 else -1)
        groups[strength(one) >= 0].append((x, one))
        crowded = any(_close(one, other, len(explanation.places)) for _, other in labels)
        if rank < _LABELLED and not crowded:
            labels.append((x, one))

    def radius(one: ExplainedNeuron) -> float:
        return (6 + (_LARGEST - 6) * math.sqrt(abs(strength(one)) / most)) / 2

    for raises, colour in ((True, colours.blue), (False, colours.orange)):
        if not groups[raises]:
            continue
        xs, ones = zip(*groups[raises], strict=True)
        panels.add_scatter(
            x=xs,
            y=[one.neuron.layer for one in ones],
            mode="markers",
            name="raise it" if raises else "lower it",
            cliponaxis=False,
            marker={
                "color": colour,
                "opacity": 0.75,
                "size": [2 * radius(one) for one in ones],
                "line": {"color": colours.background, "width": 1},
            },
            customdata=[
                [str(one.neuron), quoted(one.at), strength(one), quoted(one.label_in), quoted(one.label_out)]
                for one in ones
            ],
            hovertemplate="<b>%{customdata[0]}</b> at %{customdata[1]}<br>gives %{customdata[2]:+.2f}"
            "<br>reads %{customdata[3]}<br>writes %{customdata[4]}<extra></extra>",
            row=1,
            col=1,
        )
    for x, one in labels:
        panels.add_annotation(
            x=x,
            y=one.neuron.layer,
            text=quoted(one.label_out),
            showarrow=False,
            yshift=radius(one) + 9,
            row=1,
            col=1,
        )
    n_layers, n = explanation.places.shape
    ticks = list(range(n))
    panels.update_xaxes(
        title_text="token of the prompt",
        tickvals=ticks,
        ticktext=all_quoted(explanation.prompt),
        range=[-0.6, n - 0.4],
        tickangle=-45,
        row=1,
        col=1,
    )
    panels.update_yaxes(title_text="layer", range=[-0.05 * n_layers, 1.06 * n_layers], row=1, col=1)


def _close(one: ExplainedNeuron, other: ExplainedNeuron, n_layers: int) -> bool:
    """Whether their labels would lie on one another."""
    near = abs(one.neuron.layer - other.neuron.layer) < _CROWDED * n_layers
    return near and abs(one.position - other.position) <= 1


def _curves(panels: go.Figure, curve: Curve, colours: Theme) -> None:
    lines = (
        ("kept alone", curve.faithfulness, colours.blue, None),
        ("removed", curve.completeness, colours.orange, None),
        ("kept alone, random", curve.share(curve.kept_random), colours.blue, "dot"),
        ("removed, random", curve.share(curve.removed_random), colours.orange, "dot"),
    )
    for name, shares, colour, dash in lines:
        panels.add_scatter(
            x=curve.counts,
            y=shares.tolist(),
            mode="lines",
            name=name,
            line={"color": colour, "width": 1.5 if dash else 2.5, "dash": dash},
            hovertemplate="%{x:,} neurons " + name + "<br>%{y:.0%} of the logit<extra></extra>",
            row=1,
            col=2,
        )
    panels.update_xaxes(title_text="neurons at positions", type="log", dtick=1, row=1, col=2)
    panels.update_yaxes(title_text="of what all neurons do", tickformat=".0%", row=1, col=2)
