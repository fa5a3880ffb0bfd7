"""Figures of neurons: all of them for one token, and one of them for all tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_flash.maps import NeuronMap
from tl_flash.names import NeuronLike
from tl_flash.show.plots import theme as themes
from tl_flash.show.plots.names import named, reading_of
from tl_flash.show.plots.theme import Theme, all_quoted, quoted

_NAMED = 3
"""Neurons that a figure of all of them names."""


def token_by_layer(neurons: NeuronMap, token: str | int, *, theme: str = "light") -> go.Figure:
    """The probability of one token for every neuron, layer by layer (Davies 2025's picture of " dog").

    Coloured are the neurons whose z-score of the token exceeds the null's 99.9% of top z-scores in their layer; the
    band reaches up to the probability that a token of this z-score would have in place of a neuron's top token, in the
    median over the layer.

    Args:
        neurons: a map that tracked the token: `flash_decode(model, tokens=[" dog"])`.
        token: its string or id.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        KeyError: the token was not tracked.
        ValueError: the map is of cosines, or an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> len(plots.token_by_layer(flash_decode(model, tokens=[5]), 5).data)
        3
    """
    themes.require("neurons", neurons, NeuronMap)
    colours = themes.of(theme)
    probs = neurons.tracked_probs(token).numpy()
    name = quoted(neurons.vocab.string(neurons.vocab.id(token)))
    z = (neurons.tracked[token] / neurons.std).numpy()
    bar = np.full(len(neurons.layers), np.inf) if neurons.null is None else neurons.null.quantile().numpy()
    beyond = z > bar[:, None]
    figure = themes.figure(
        colours,
        f"Which neurons stand for {name}",
        f"{reading_of(neurons.origin)} · {int(beyond.sum())} of {len(neurons):,} neurons have it beyond the null",
        "layer",
        f"probability of {name}",
    )
    if neurons.null is not None:
        _null_band(figure, neurons, bar, colours)
    for part, label, colour, opacity in (
        (~beyond, "not beyond the null" if neurons.null is not None else "every neuron", colours.grey, 0.45),
        (beyond, "beyond the null's 99.9%", colours.blue, 0.9),
    ):
        figure.add_trace(_points(neurons, part, probs, z, label, colour, opacity))
    for flat in np.argsort(-probs, axis=None, kind="stable")[:_NAMED].tolist():
        row, index = divmod(flat, neurons.d_mlp)
        text = {"text": str(neurons.neuron(row, index)), "font": {"size": 12, "color": colours.text}}
        x = neurons.layers[row] + _offset(index, neurons)
        figure.add_annotation(x=x, y=float(probs[row, index]), showarrow=False, yshift=12, **text)
    return figure.update_xaxes(tickvals=list(neurons.layers)).update_yaxes(rangemode="tozero", tickformat=".0~%")


def _offset(index: Any, neurons: NeuronMap) -> Any:
    """Where a neuron stands beside its layer's tick."""
    return 0.8 * (index / neurons.d_mlp - 0.5)


def _points(
    neurons: NeuronMap, part: np.ndarray, probs: np.ndarray, z: np.ndarray, label: str, colour: str, opacity: float
) -> go.Scattergl:
    row, index = part.nonzero()
    layer = np.asarray(neurons.layers)[row]
    name, names = named(map(neurons.neuron, row.tolist(), index.tolist()), experts=neurons.n_experts is not None)
    return go.Scattergl(
        x=(layer + _offset(index, neurons)).astype(np.float32),
        y=probs[part],
        name=label,
        mode="markers",
        marker={"size": 6, "color": colour, "opacity": opacity, "line": {"width": 0}},
        customdata=np.stack([layer, index, z[part]], axis=1).astype(np.float32),
        text=all_quoted(neurons.vocab.names[neurons.positive.ids[..., 0].numpy()[part]]),
        hovertemplate=(
            f"{name}<br>probability %{{y:.3g}}<br>z %{{customdata[2]:.2f}}<br>top token %{{text}}<extra></extra>"
        ),
        **names,
    )


def _null_band(figure: go.Figure, neurons: NeuronMap, bar: np.ndarray, colours: Theme) -> None:
    at_bar = _probability_of(torch.from_numpy(bar)[:, None], neurons).nanmedian(1).values
    x, y = [], []
    for layer, height in zip(neurons.layers, at_bar.tolist(), strict=True):
        x += [layer - 0.46, layer - 0.46, layer + 0.46, layer + 0.46, None]
        y += [0, height, height, 0, None]
    figure.add_scatter(
        x=x,
        y=y,
        name="null's band",
        mode="lines",
        fill="toself",
        line={"width": 1, "color": themes.faint(colours.grey, 0x66)},
        fillcolor=themes.faint(colours.grey, 0x1C),
        hoverinfo="skip",
    )


def _probability_of(z: Tensor, neurons: NeuronMap) -> Tensor:
    """Of a token of z-score `z` in place of each neuron's top token, the others as they are: [layer, neuron]."""
    top = neurons.positive
    log_others = top.log_z.double() + torch.log1p(-top.probs[..., 0].double().clamp(max=1 - 1e-12))
    return torch.sigmoid(top.tau.double() * neurons.std.double() * z.double() - log_others)


def neuron(
    neurons: NeuronMap,
    which: NeuronLike,
    *,
    scores: Float[Tensor, " d_vocab"] | None = None,
    theme: str = "light",
) -> go.Figure:
    """One neuron: where its top tokens lie in the distribution of its scores, and both poles as bars.

    A map keeps the scores' mean, standard deviation and kurtosis, not the scores; without `scores` the curve is the
    normal distribution, which a neuron of no meaning would about follow.

    Args:
        neurons: the map.
        which: the neuron.
        scores: its logits over the vocabulary, if at hand: `x @ W_U'`, with or without their mean.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        KeyError: the map does not hold the neuron.
        ValueError: scores of another length or of another neuron, or an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> plots.neuron(flash_decode(model, k=3), "L1N3").layout.xaxis2.title.text
        'z-score of the token'
    """
    themes.require("neurons", neurons, NeuronMap)
    colours = themes.of(theme)
    reading, (row, index) = neurons[which], neurons.place(which)
    z = None if scores is None else _standardised(neurons, row, index, scores)
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.05, row_heights=[0.32, 0.68])
    figure.update_layout(template=colours.template(), bargap=0.22, height=330 + 34 * neurons.k)
    curves = [("normal of the same mean and std", *_curve(neurons.d_vocab), "spline")]
    if z is not None:
        curves.insert(0, ("all tokens", *_histogram(z), "hvh"))
    for at, (name, centre, counts, shape) in enumerate(curves):
        figure.add_scatter(
            x=centre,
            y=counts,
            name=name,
            mode="lines",
            line={"color": colours.grey, "width": 1.5, "shape": shape, "dash": "dot" if at else "solid"},
            fill=None if at else "tozeroy",
            fillcolor=themes.faint(colours.grey, 0x30),
            hovertemplate="z %{x:.2f}<br>tokens %{y:.3g}<extra></extra>",
        )
    ticks: dict[str, str] = {}
    for hits, sign, name, colour in (
        (reading.positive, 1, "positive pole", colours.blue),
        (reading.negative, -1, "negative pole", colours.orange),
    ):
        at = [sign * hit.z for hit in hits]
        text = [quoted(hit.token) for hit in hits]
        hover = [[f"{hit.prob:.3g}" if hit.prob == hit.prob else "none (cosines)", hit.write_z] for hit in hits]
        shared = {
            "customdata": hover,
            "text": text,
            "hovertemplate": f"<b>{reading.neuron}</b> {name}<br>token %{{text}}<br>z %{{x:.2f}}"
            "<br>probability %{customdata[0]}<br>write z %{customdata[1]:+.2f}<extra></extra>",
        }
        rug = {"symbol": "line-ns", "size": 14, "line": {"color": colour, "width": 1.5}}
        figure.add_scatter(x=at, y=[0.7] * len(at), mode="markers", marker=rug, showlegend=False, **shared)
        places = [f"{name[0]}{rank}" for rank in range(len(hits))]
        bars = {"orientation": "h", "marker_color": colour, "textposition": "none", "name": name}
        figure.add_bar(x=at, y=places, row=2, col=1, **bars, **shared)
        ticks |= dict(zip(places, text, strict=True))
    if reading.null_z == reading.null_z:
        for sign in (-1, 1):
            figure.add_vline(x=sign * reading.null_z, line={"color": colours.muted, "dash": "dot", "width": 1})
        figure.add_annotation(
            x=reading.null_z, y=1, yref="y domain", text="null's 99.9%", showarrow=False, xanchor="left", xshift=4,
            font={"color": colours.muted, "size": 12},
        )  # fmt: skip
    label = quoted(max(reading.positive[0], reading.negative[0], key=lambda hit: hit.z).token)
    stands = "stands for" if reading.specialised else "has as its top token"
    verdict = "" if neurons.null is None else " · specialised" if reading.specialised else " · not specialised"
    themes.titled(
        figure,
        colours,
        f"{reading.neuron} {stands} {label}",
        f"{reading_of(neurons.origin)} · excess kurtosis {reading.kurtosis:.2f}, norm {reading.norm:.3g}{verdict}",
    )
    figure.update_yaxes(
        autorange="reversed", showgrid=False, tickfont={"size": 11}, title_text="top tokens", row=2, col=1
    )
    highest = np.log10(max(max(counts) for _, _, counts, _ in curves))
    figure.update_yaxes(
        type="log", title_text="tokens<br>per 0.25 z", dtick=1, range=[-0.4, highest + 0.2], row=1, col=1
    )
    figure.update_xaxes(showline=False, row=1, col=1)
    return figure.update_xaxes(title_text="z-score of the token", row=2, col=1)


_BIN = 0.25


def _standardised(neurons: NeuronMap, row: int, index: int, scores: Tensor) -> np.ndarray:
    if tuple(scores.shape) != (neurons.d_vocab,):
        raise ValueError(f"scores: expected shape ({neurons.d_vocab},), a logit a token, got {tuple(scores.shape)}")
    centred = scores.detach().float().cpu() - scores.detach().float().cpu().mean()
    listed, own = neurons.positive.logits[row, index], centred[neurons.positive.ids[row, index].long()]
    if ((listed - own).abs() > 0.02 * listed.abs() + 1e-6).any():
        raise ValueError(
            f"scores: the map gives {neurons.neuron(row, index)}'s top token the logit {float(listed[0]):.4g}, "
            f"these scores {float(own[0]):.4g}; give those of this neuron, on the map's side and with its folding"
        )
    return (centred / neurons.std[row, index]).numpy()


def _histogram(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    reach = float(np.ceil(np.abs(z).max() / _BIN)) * _BIN
    counts, edges = np.histogram(z, bins=np.arange(-reach, reach + _BIN / 2, _BIN))
    return (edges[:-1] + _BIN / 2).round(3), np.maximum(counts, 0.3)


def _curve(d_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    z = np.linspace(-5, 5, 201)
    return z, np.maximum(d_vocab * _BIN * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), 0.3)
