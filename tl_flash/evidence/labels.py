"""Labels of a user's own, as the hits that a map would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.decode import decode_directions
from tl_flash.lens import folded_unembedding
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
    above = _ranks(weights, writes, ids)
    hits = tuple(_hit(read, i, neuron, ids[i], above[i]) for i, neuron in enumerate(neurons))
    layers = tuple(sorted({neuron.layer for neuron in neurons}))
    return Hits(
        hits=hits,
        token_ids=tuple(ids),
        ids=torch.stack([read.pole(hit.pole).ids[0, i] for i, hit in enumerate(hits)]),
        origin=Origin("out", "dot", layers, None, read.source, read.vocab, None),
        title="labels of the user's own",
    )


def _ranks(weights: MLPWeights, writes: Float[Tensor, "neuron d_model"], ids: Sequence[int]) -> list[tuple[int, int]]:
    """How many tokens with a name each direction, and its opposite, scores higher than its own token."""
    W_U, found = folded_unembedding(weights), []
    named = torch.ones(W_U.shape[1], dtype=torch.bool, device=W_U.device)
    named[weights.vocab.nameless()] = False
    for x, id in zip(writes.to(W_U), ids, strict=True):
        scores = x @ W_U
        own, others = scores[id], scores[named]
        found.append((int((others > own).sum()), int((others < own).sum())))
    return found


def _hit(read: NeuronMap, i: int, neuron: Neuron, id: int, above: tuple[int, int]) -> Hit:
    if read.zero[0, i]:
        raise ValueError(f"labels: {neuron} writes nothing, its W_out is zero; leave it out")
    logit = float(read.tracked[id][0, i])
    sign, pole = (1, "positive") if logit >= 0 else (-1, "negative")
    top = read.pole(pole)
    listed = top.ids[0, i].tolist()
    z = logit / float(read.std[0, i])
    return Hit(
        neuron=neuron,
        pole=pole,
        rank=listed.index(id) if id in listed else max(above[pole == "negative"], len(listed)),
        token=read.vocab.string(id),
        logit=sign * logit,
        prob=float(torch.exp(top.tau[0, i] * sign * logit - top.log_z[0, i])),
        z=sign * z,
        write_z=z,
    )
