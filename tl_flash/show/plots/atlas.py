"""A map of neurons: their directions in two dimensions, coloured by what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.maps import Hits, NeuronMap
from tl_flash.names import AnyNeuron
from tl_flash.show.plots import theme as themes
from tl_flash.show.plots.names import named, reading_of
from tl_flash.show.plots.theme import all_quoted, quoted

_COMPONENTS, _ROUNDS, _NAMED = 16, 20, 4


def neuron_atlas(
    directions: Float[Tensor, "n d_model"], labels: NeuronMap | Hits, *, clusters: int = 6, theme: str = "light"
) -> go.Figure:
    """Neurons as points: the two principal components of their unit directions, coloured by cluster.

    Each direction points to its labelled pole. Clusters are k-means of the first 16 components, named by the
    labels most their own. Two components keep little: neurons far apart here are unlike, neurons side by side may be
    unlike in other dimensions; the axes say how much of the variance they keep. Drawn by WebGL.

    Args:
        directions: a row a neuron, as `MLPWeights.directions` gives them, in the order of the labels: a map's layer by
            layer, or the hits'.
        labels: a map (each neuron by the top token of its better pole) or Hits, such as `.specialised(n)`.
        clusters: how many, at most 6, a colour each.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        ValueError: another number of rows than labels, fewer than 3 neurons, more than 6 clusters, or an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> from tl_flash.weights import read
        >>> weights = read(model)
        >>> x = torch.cat([weights.directions(layer, "out") for layer in range(weights.n_layers)])
        >>> sum(len(trace.x) for trace in plots.neuron_atlas(x, flash_decode(model, side="out")).data)
        104
    """
    themes.require("directions", directions, torch.Tensor)
    themes.require("labels", labels, NeuronMap, Hits)
    colours = themes.of(theme)
    if not 1 <= clusters <= len(colours.cycle):
        raise ValueError(f"clusters: expected 1 to {len(colours.cycle)}, a colour each, got {clusters}")
    origin = labels.origin
    if len(labels) < 3:
        raise ValueError(f"labels: expected at least 3 neurons, got {len(labels)}")
    neuron_at, (layer, index, negative, ids, z, prob) = _labels(labels)
    if directions.ndim != 2 or len(directions) != len(ids):
        raise ValueError(f"directions: expected [{len(ids)}, d_model], a row a label, got {tuple(directions.shape)}")
    components, kept = _principal(directions * torch.from_numpy(np.where(negative, -1.0, 1.0))[:, None].float())
    cluster = _cluster(components, clusters)
    places = components[:, :2].numpy()
    figure = themes.figure(
        colours,
        "A map of neurons by what they stand for",
        f"{len(ids):,} neurons of {reading_of(origin)} · principal components of their "
        "directions · clusters named by their own labels",
        f"first principal component ({kept[0]:.1%} of the variance)",
        f"second principal component ({kept[1]:.1%})",
    )
    for at in np.argsort(-np.bincount(cluster, minlength=clusters), kind="stable").tolist():
        part, colour = cluster == at, colours.cycle[at]
        template, named_by = named(map(neuron_at, np.flatnonzero(part).tolist()), experts=origin.n_experts is not None)
        names = ", ".join(quoted(origin.vocab.string(id)) for id in _own(ids, part))
        figure.add_trace(
            go.Scattergl(
                x=places[part, 0],
                y=places[part, 1],
                name=f"{names}: {int(part.sum()):,}",
                mode="markers",
                marker={"size": 7 if len(ids) < 5_000 else 4, "color": colour, "opacity": 0.75},
                customdata=np.stack([layer, index, z, prob], axis=1)[part].astype(np.float32),
                text=all_quoted(origin.vocab.names[ids[part]]),
                hovertemplate=(
                    f"{template}<br>token %{{text}}<br>z %{{customdata[2]:.2f}}"
                    "<br>probability %{customdata[3]:.3g}<extra></extra>"
                ),
                **named_by,
            )
        )
        outwards = np.argsort(-np.hypot(*places[part].T), kind="stable")
        for i in _spread(places, np.flatnonzero(part)[outwards]):
            text = quoted(origin.vocab.string(int(ids[i])))
            font = {"size": 11, "color": colours.text}
            figure.add_annotation(x=places[i, 0], y=places[i, 1], text=text, showarrow=False, yshift=11, font=font)
    figure.update_layout(
        margin={"t": 92},
        legend={"orientation": "v", "itemsizing": "constant", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"},
    )
    return figure


def _labels(labels: NeuronMap | Hits) -> tuple[Callable[[int], AnyNeuron], tuple[np.ndarray, ...]]:
    """Which neuron a row is of, and of each: layer, index, whether the negative pole is meant, id, z, probability."""
    if isinstance(labels, Hits):
        columns = [
            (hit.neuron.layer, hit.neuron.index, hit.pole == "negative", labels.token_id(hit), hit.z, hit.prob)
            for hit in labels
        ]
        return (lambda row: labels[row].neuron), tuple(np.array(column) for column in zip(*columns, strict=True))
    negative = labels.negative.z[..., 0] > labels.positive.z[..., 0]
    cosines = labels.score != "dot"

    def better(of: str) -> np.ndarray:
        poles: Sequence[Tensor] = [getattr(pole, of)[..., 0] for pole in (labels.negative, labels.positive)]
        return torch.where(negative, *poles).flatten().numpy()

    return (lambda row: labels.neuron(*divmod(row, labels.d_mlp))), (
        np.repeat(labels.layers, labels.d_mlp),
        np.tile(np.arange(labels.d_mlp), len(labels.layers)),
        negative.flatten().numpy(),
        better("ids"),
        better("z"),
        np.full(len(labels), np.nan) if cosines else better("probs"),
    )


def _principal(x: Float[Tensor, "n d_model"]) -> tuple[Float[Tensor, "n component"], list[float]]:
    """Principal components of the unit directions, and their shares of the variance.

    The sign of an axis is such that its largest entry is positive.
    """
    x = torch.nn.functional.normalize(x.detach().float().cpu(), dim=1)
    x = x - x.mean(0)
    variances, axes = torch.linalg.eigh((x.T @ x).double())
    axes = axes.flip(1)[:, :_COMPONENTS]
    axes = axes * axes.gather(0, axes.abs().argmax(0)[None]).sign()
    return x @ axes.float(), (variances.flip(0)[:_COMPONENTS] / variances.sum()).tolist()


def _cluster(x: Float[Tensor, "n component"], count: int) -> np.ndarray:
    """k-means, started from points far from one another; the same every time."""
    centres = x[x.square().sum(1).argmax()][None]
    while len(centres) < count:
        centres = torch.cat([centres, x[torch.cdist(x, centres).amin(1).argmax()][None]])
    nearest = torch.cdist(x, centres).argmin(1)
    for _ in range(_ROUNDS):
        members = torch.nn.functional.one_hot(nearest, count).float()
        centres = torch.where(members.any(0)[:, None], members.T @ x / members.sum(0)[:, None].clamp(min=1), centres)
        nearest = torch.cdist(x, centres).argmin(1)
    return nearest.numpy()


def _own(ids: np.ndarray, part: np.ndarray) -> list[int]:
    """The three labels most a cluster's own: common in it, rare outside."""
    values, counts = np.unique(ids[part], return_counts=True)
    labels, everywhere = np.unique(ids, return_counts=True)
    everywhere = everywhere[np.searchsorted(labels, values)]
    return values[np.argsort(-(counts**2) / everywhere, kind="stable")[:3]].tolist()


def _spread(places: np.ndarray, order: np.ndarray) -> list[int]:
    """The first few points in this order that keep their distance from one another, to be named."""
    apart, chosen = 0.07 * np.ptp(places, axis=0).max(), []
    for i in order[:200].tolist():
        if all(np.hypot(*(places[i] - places[j])) > apart for j in chosen):
            chosen.append(i)
        if len(chosen) == _NAMED:
            break
    return chosen
