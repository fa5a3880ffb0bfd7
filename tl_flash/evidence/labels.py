"""Labels of a user's own, as the hits that a map would give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tl_flash.decode import decode_directions
from tl_flash.maps import Hit, Hits, NeuronMap, Origin
from tl_flash.names import Neuron, NeuronKey
from tl_flash.weights import MLPWeights

_LISTED = 10
"""Tokens listed beside each label."""


def own_labels(model: Any, weights: MLPWeights, labels: Mapping[NeuronKey, str | int]) -> Hits:
    """Neurons with the tokens that a user takes them to stand for, each at the pole of its write direction that has it.

    Args:
        model: whose neurons they are.
        weights: what was read of it.
        labels: a token for each neuron, by its exact string or its id.

    Raises:
        ValueError: no label, an unknown neuron or token, a neuron named twice or one that writes nothing.
    """
    neurons = [Neuron.of(name) for name in labels]
    if len(set(neurons)) < len(neurons):
        raise ValueError(f"labels: expected each neuron once, got {', '.join(map(str, neurons))}")
    for neuron in neurons:
        if neuron.layer >= weights.n_layers or neuron.index >= weights.d_mlp:
            raise ValueError(f"labels: {neuron} is no neuron of this model")
    ids = weights.vocab.ids(list(labels.values()))
    writes = torch.stack([weights.directions(layer, "out")[index] for layer, index in neurons])
    k = min(_LISTED, weights.d_vocab - len(weights.vocab.nameless()))
    read = decode_directions(writes, model, k=k, tokens=sorted(set(ids)))
    hits, listed = zip(
        *(_hit(read, i, neuron, id) for i, (neuron, id) in enumerate(zip(neurons, ids, strict=True))), strict=True
    )
    layers = tuple(sorted({neuron.layer for neuron in neurons}))
    origin = Origin("out", "dot", layers, None, read.source, read.vocab, None)
    return Hits(hits, torch.stack(listed), origin, "labels of the user's own")


def _hit(read: NeuronMap, i: int, neuron: Neuron, id: int) -> tuple[Hit, torch.Tensor]:
    if read.zero[0, i]:
        raise ValueError(f"labels: {neuron} writes nothing, its W_out is zero; leave it out")
    logit = float(read.tracked[id][0, i])
    sign, pole = (1, "positive") if logit >= 0 else (-1, "negative")
    top = read.pole(pole)
    listed = top.ids[0, i].clone()
    if not (listed == id).any():
        listed[-1] = id
    z = logit / float(read.std[0, i])
    hit = Hit(
        neuron=neuron,
        pole=pole,
        rank=int((listed == id).nonzero()[0]),
        token=read.vocab.string(id),
        logit=sign * logit,
        prob=float(torch.exp(top.tau[0, i] * sign * logit - top.log_z[0, i])),
        z=sign * z,
        write_z=z,
    )
    return hit, listed
