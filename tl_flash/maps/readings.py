"""What a decode gave: every neuron's top tokens and statistics as tensors, and where in them a neuron stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_flash.maps.null import Null
from tl_flash.maps.origin import Origin, Source
from tl_flash.maps.top_tokens import TopTokens, require_probabilities
from tl_flash.names import AnyNeuron, ExpertNeuron, Neuron, NeuronLike, neuron_of
from tl_flash.vocab import Vocab

POLES = ("positive", "negative")


class Tracked(Mapping[str | int, Tensor]):
    """Logits [layer, neuron] of the tokens asked for by name, under their strings or ids."""

    def __init__(self, ids: list[int], logits: Float[Tensor, "token layer neuron"], vocab: Vocab) -> None:
        self.ids, self.logits, self._vocab = ids, logits, vocab

    def __getitem__(self, token: str | int) -> Float[Tensor, "layer neuron"]:
        id = self._vocab.id(token)
        if id not in self.ids:
            raise KeyError(f"token {token!r} was not tracked; decode with tokens=[{token!r}] to keep its logits")
        return self.logits[self.ids.index(id)]

    def __iter__(self) -> Iterator[str]:
        return (self._vocab.string(id) for id in self.ids)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Readings:
    """Every decoded neuron's top tokens at both poles, with the statistics of its scores over the vocabulary.

    The first axis of every tensor runs over `layers`, the second over the neurons of a layer.
    """

    side: str
    """"in", "gate" or "out"; "direction" for directions of the user's own."""
    score: str
    n_layers: int
    """Layers of the model, of which `layers` are decoded."""
    layers: tuple[int, ...]
    n_experts: int | None
    """Experts of each layer, the shared ones last (`ExpertNeuron`), whose neurons follow one another along the second
    axis; None where the MLPs are dense."""
    d_model: int
    source: Source
    vocab: Vocab
    positive: TopTokens
    negative: TopTokens
    norm: Float[Tensor, "layer neuron"]
    """Length of the direction (LayerNorm: of the centred direction); 0 for a zero direction."""
    mean: Float[Tensor, "layer neuron"]
    """Vocabulary mean that was taken off the logits; 0 where the model was loaded with center_unembed."""
    std: Float[Tensor, "layer neuron"]
    kurtosis: Float[Tensor, "layer neuron"]
    """Excess kurtosis of the scores over the vocabulary; high for neurons with one coherent meaning."""
    null: Null | None
    tracked: Tracked

    @property
    def k(self) -> int:
        """Tokens kept at each pole."""
        return self.positive.ids.shape[2]

    @property
    def d_mlp(self) -> int:
        """Neurons in a layer, those of all its experts."""
        return self.positive.ids.shape[1]

    @property
    def d_vocab(self) -> int:
        """Tokens of the unembedding."""
        return self.vocab.d_vocab

    @property
    def zero(self) -> Bool[Tensor, "layer neuron"]:
        """Where a direction is zero (a pruned neuron, a dead latent) and has no reading: its statistics are NaN."""
        return self.positive.ids[..., 0] < 0

    @property
    def origin(self) -> Origin:
        """What is the same for all neurons."""
        return Origin(self.side, self.score, self.layers, self.n_experts, self.source, self.vocab, self.null)

    def pole(self, name: str) -> TopTokens:
        """The top tokens at the "positive" or "negative" pole."""
        return {"positive": self.positive, "negative": self.negative}[name]

    def row(self, neuron: NeuronLike) -> int:
        """The place of a neuron's layer along the tensors' first axis.

        Raises:
            KeyError: the map does not hold the neuron.
        """
        return self.place(neuron)[0]

    def place(self, neuron: NeuronLike) -> tuple[int, int]:
        """The place of a neuron along the tensors' first two axes.

        Raises:
            KeyError: the map does not hold the neuron.
        """
        neuron = neuron_of(neuron)
        expert = neuron.expert if isinstance(neuron, ExpertNeuron) else None
        width = self.d_mlp // (self.n_experts or 1)
        known = (expert is None) == (self.n_experts is None) and (expert or 0) < (self.n_experts or 1)
        if neuron.layer not in self.layers or not known or neuron.index >= width:
            experts = "" if self.n_experts is None else f"experts 0 to {self.n_experts - 1} of each, "
            raise KeyError(
                f"neuron {neuron}: this map holds layers {list(self.layers)}, {experts}neurons 0 to {width - 1} of each"
            )
        return self.layers.index(neuron.layer), (expert or 0) * width + neuron.index

    def neuron(self, row: int, column: int) -> AnyNeuron:
        """The neuron at a place along the tensors' first two axes."""
        if self.n_experts is None:
            return Neuron(self.layers[row], column)
        return ExpertNeuron(self.layers[row], *divmod(column, self.d_mlp // self.n_experts))

    def tracked_probs(self, token: str | int) -> Float[Tensor, "layer neuron"]:
        """Probability of a tracked token for every neuron, at the positive pole.

        Raises:
            KeyError: the token was not tracked.
            ValueError: the map is of cosines.
        """
        require_probabilities(self.score)
        return torch.exp(self.positive.tau * self.tracked[token] - self.positive.log_z)

    def __len__(self) -> int:
        return len(self.layers) * self.d_mlp
