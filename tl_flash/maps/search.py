"""Search and ranking: which neurons have a token among their top ones, which are specialised."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_flash.maps.hits import Hit, Hits
from tl_flash.maps.readings import POLES, Readings
from tl_flash.maps.top_tokens import require_probabilities

ORDERS = ("z", "prob", "write", "coherence")
SIDES = ("in", "gate", "out")
"""Those of a model's own neurons, not of directions of the user's."""

Place = tuple[str, int, int, int]
"""Pole, row, column and rank of a token in a map."""


def find(readings: Readings, token: str | int, n: int, pole: str, by: str) -> Hits:
    """See `NeuronMap.find`."""
    _require(readings, n, by)
    if pole not in (*POLES, "both"):
        raise ValueError(f'pole: expected "positive", "negative" or "both", got {pole!r}')
    id = readings.vocab.id(token)
    found: list[tuple[float, Place]] = []
    for name in POLES if pole == "both" else (pole,):
        mask = readings.pole(name).ids == id
        keys, places = _key(readings, name, by)[mask].tolist(), mask.nonzero().tolist()
        found += [(key, (name, *place)) for key, place in zip(keys, places, strict=True)]
    found.sort(key=lambda pair: -pair[0])
    title = f'neurons with {readings.vocab.string(id)!r} among their top {readings.k}, side "{readings.side}", by {by}'
    if len(found) < n and readings.side in SIDES:
        title += f" (a map keeps no more; find_neurons scores all {len(readings):,} neurons)"
    return _hits(readings, (place for _, place in found[:n]), title)


def specialised(readings: Readings, n: int, quantile: float, by: str) -> Hits:
    """See `NeuronMap.specialised`."""
    _require(readings, n, by)
    keys = torch.stack([_key(readings, pole, by)[..., 0] for pole in POLES])  # [pole, layer, neuron]
    best, pole = keys.masked_fill(~beyond_null(readings, quantile), -torch.inf).max(0)
    order = best.flatten().argsort(descending=True, stable=True)[:n]
    order = order[best.flatten()[order] > -torch.inf]
    poles = pole.flatten()[order].tolist()
    places = ((POLES[pole], *divmod(flat, readings.d_mlp), 0) for pole, flat in zip(poles, order.tolist(), strict=True))
    return _hits(readings, places, f'the most specialised neurons, side "{readings.side}", by {by}')


def require_count(name: str, count: object) -> None:
    """Refuse what is no whole number of 1 or more.

    Raises:
        ValueError: with the argument's name.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: expected a whole number, 1 or more, got {count!r}")


def beyond_null(readings: Readings, quantile: float) -> Bool[Tensor, "pole layer neuron"]:
    """Where a pole's top z-score exceeds a quantile of the null.

    Raises:
        ValueError: no null, or a quantile that it cannot give.
    """
    threshold = torch.tensor(list(readings.origin.bars(quantile).values()), dtype=torch.float32)
    return torch.stack([readings.pole(pole).z[..., 0] > threshold[:, None] for pole in POLES])


def hit_at(readings: Readings, place: Place) -> Hit:
    """The token at a place."""
    pole, row, column, rank = place
    top = readings.pole(pole)
    logit, std = float(top.logits[row, column, rank]), float(readings.std[row, column])
    log_prob = float(top.tau[row, column]) * logit - float(top.log_z[row, column])
    return Hit(
        neuron=readings.neuron(row, column),
        pole=pole,
        rank=rank,
        token=readings.vocab.string(int(top.ids[row, column, rank])),
        logit=logit,
        prob=float(np.exp(log_prob)),
        z=logit / std,
        write_z=float(top.write_z[row, column, rank]),
    )


def _hits(readings: Readings, places: Iterable[Place], title: str) -> Hits:
    places = list(places)
    ids = [readings.pole(pole).ids[row, column] for pole, row, column, _ in places]
    return Hits(
        hits=tuple(hit_at(readings, place) for place in places),
        token_ids=tuple(int(top[rank]) for top, (*_, rank) in zip(ids, places, strict=True)),
        ids=torch.stack(ids) if ids else torch.empty(0, readings.k, dtype=torch.int32),
        origin=readings.origin,
        title=title,
    )


def _key(readings: Readings, pole: str, by: str) -> Float[Tensor, "layer neuron k"]:
    top = readings.pole(pole)
    if by == "prob":
        return top.probs
    if by == "write":
        return top.write_z.abs()
    return torch.minimum(top.z, top.write_z.abs()) if by == "coherence" else top.z


def _require(readings: Readings, n: int, by: str) -> None:
    if by not in ORDERS:
        raise ValueError(f"by: expected one of {', '.join(map(repr, ORDERS))}, got {by!r}")
    if by == "prob":
        require_probabilities(readings.score)
    require_count("n", n)
