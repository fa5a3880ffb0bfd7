"""The result of a decode, and the questions that it answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.hits import Hit, Hits
from tl_flash.neurons import AnyNeuron, ExpertNeuron, Neuron, NeuronLike, neuron_of
from tl_flash.null import Null
from tl_flash.reading import NeuronReading
from tl_flash.top_tokens import TopTokens, require_probabilities
from tl_flash.vocab import Vocab

if TYPE_CHECKING:
    import pandas as pd

POLES = ("positive", "negative")
ORDERS = ("z", "prob", "write", "coherence")


@dataclass(frozen=True)
class Source:
    """Where a map comes from."""

    model: str
    model_class: str
    fingerprint: str
    """Digest of the weights decoded, as the model held them."""
    dtype: str
    fold_ln: bool
    lens: str | None
    """Digest of the Jacobian lens that what is written was carried through, if one was."""
    center_unembed: bool
    """Whether W_U came without its vocabulary mean; no logit or probability can see it, but cosines do."""
    precision: str
    repaired: int
    """Rows whose first screening did not prove their top tokens, so that they were done again."""
    versions: dict[str, str]


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
class NeuronMap:
    """Every decoded neuron's top tokens at both poles, with the statistics of its scores over the vocabulary.

    The first axis of every tensor runs over `layers`, the second over the neurons of a layer. Made by
    `tl_flash.flash_decode`; frozen.
    """

    side: str
    """"in", "gate" or "out"; "direction" for directions of the user's own."""
    score: str
    n_layers: int
    """Layers of the model, of which `layers` are decoded."""
    layers: tuple[int, ...]
    n_experts: int | None
    """Experts of each layer, whose neurons follow one another along the second axis; None where the MLPs are dense."""
    d_model: int
    source: Source
    vocab: Vocab
    positive: TopTokens
    negative: TopTokens
    norm: Float[Tensor, "layer neuron"]
    """Length of the direction (LayerNorm: of the centred direction)."""
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

    def __getitem__(self, neuron: NeuronLike) -> NeuronReading:
        row, index = self.place(neuron)
        positive, negative = (self._hits(pole, [row] * self.k, [index] * self.k, range(self.k)) for pole in POLES)
        return NeuronReading(
            neuron=self.neuron(row, index),
            side=self.side,
            score=self.score,
            positive=positive,
            negative=negative,
            norm=float(self.norm[row, index]),
            std=float(self.std[row, index]),
            kurtosis=float(self.kurtosis[row, index]),
            null_z=float(self.null.quantile()[row]) if self.null is not None else float("nan"),
        )

    def __len__(self) -> int:
        return len(self.layers) * self.d_mlp

    def tracked_probs(self, token: str | int) -> Float[Tensor, "layer neuron"]:
        """Probability of a tracked token for every neuron, at the positive pole.

        Raises:
            KeyError: the token was not tracked.
            ValueError: the map is of cosines.
        """
        require_probabilities(self.score)
        return torch.exp(self.positive.tau * self.tracked[token] - self.positive.log_z)

    def find(self, token: str | int, n: int = 10, pole: str = "both", by: str = "z") -> Hits:
        """The neurons whose top tokens hold a token, best first.

        Args:
            token: its exact string, leading space included, or its id.
            n: how many at most.
            pole: "positive", "negative" or "both".
            by: rank by "z", "prob", "write" (|write_z|: how much the neuron writes the token) or "coherence"
                (the smaller of z and |write_z|: it reads the token and writes it).

        Raises:
            ValueError: an unknown token, pole or order, n below 1, or `by="prob"` on a map of cosines.
        """
        self._require(n, by)
        if pole not in (*POLES, "both"):
            raise ValueError(f'pole: expected "positive", "negative" or "both", got {pole!r}')
        id = self.vocab.id(token)
        places = []
        for name in POLES if pole == "both" else (pole,):
            mask = self._pole(name).ids == id
            places += [(key, name, place) for key, place in self._ranked(name, mask, by)]
        places.sort(key=lambda place: -place[0])
        hits = tuple(self._hit(name, *place) for _, name, place in places[:n])
        title = f'neurons with {self.vocab.string(id)!r} among their top {self.k}, side "{self.side}", by {by}'
        return Hits(hits, self, title)

    def specialised(self, n: int = 50, quantile: float = 0.999, by: str = "z") -> Hits:
        """The most specialised neurons, best first, each by the top token of its better pole.

        A neuron is specialised where a pole's top z-score exceeds the chosen quantile of the null's, layer by layer.

        Args:
            n: how many at most; fewer come where fewer are specialised.
            quantile: of the null.
            by: as in `find`, of the top token.

        Raises:
            ValueError: an unknown order, n below 1, a quantile that the null cannot give, or a map without a null.
        """
        self._require(n, by)
        keys = torch.stack([self._key(pole, by)[..., 0] for pole in POLES])  # [pole, layer, neuron]
        keys = keys.masked_fill(~self._specialised(quantile), -torch.inf)
        best, pole = keys.max(0)
        order = best.flatten().argsort(descending=True, stable=True)[:n]
        order = order[best.flatten()[order] > -torch.inf]
        hits = tuple(
            self._hit(POLES[int(pole.flatten()[flat])], int(flat) // self.d_mlp, int(flat) % self.d_mlp, 0)
            for flat in order
        )
        return Hits(hits, self, f'the most specialised neurons, side "{self.side}", by {by}')

    def n_specialised(self, quantile: float = 0.999) -> int:
        """How many neurons have a pole whose top z-score exceeds the null's quantile."""
        return int(self._specialised(quantile).any(0).sum())

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a neuron and pole."""
        import pandas as pd

        L, M, E = len(self.layers), self.d_mlp, self.n_experts or 1
        frames = []
        for pole in POLES:
            top = self._pole(pole)
            strings = top.strings.reshape(L * M, self.k)
            columns = {
                "neuron": [str(self.neuron(row, column)) for row in range(L) for column in range(M)],
                "layer": np.repeat(self.layers, M),
                **({} if self.n_experts is None else {"expert": np.tile(np.repeat(np.arange(E), M // E), L)}),
                "index": np.tile(np.arange(M // E), L * E),
                "pole": pole,
                "token": strings[:, 0],
                "tokens": list(map(tuple, strings)),
                "token_id": top.ids[..., 0],
                "logit": top.logits[..., 0],
                "prob": top.probs[..., 0] if self.score == "dot" else torch.full((L, M), torch.nan),
                "z": top.z[..., 0],
                "write_z": top.write_z[..., 0],
                "log_z": top.log_z,
                "norm": self.norm,
                "mean": self.mean,
                "std": self.std,
                "kurtosis": self.kurtosis,
            }
            frames.append(
                pd.DataFrame({k: v.flatten().numpy() if torch.is_tensor(v) else v for k, v in columns.items()})
            )
        frame = pd.concat(frames, ignore_index=True)
        order = ["layer", *(["expert"] if self.n_experts else []), "index"]
        return frame.sort_values(order, kind="stable", ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write the map to one safetensors file, whole or not at all."""
        from tl_flash import storage

        storage.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> NeuronMap:
        """Read a map that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, altered, no map, or of a newer format.
        """
        from tl_flash import storage

        return storage.load(path)

    def __repr__(self) -> str:
        source = self.source
        experts = f"{self.n_experts} experts x " if self.n_experts else ""
        text = (
            f"NeuronMap of {source.model} ({source.model_class}): {len(self.layers)} layers x {experts}"
            f"{self.d_mlp // (self.n_experts or 1)} neurons, "
            f'side "{self.side}", score "{self.score}", k={self.k}, d_vocab={self.d_vocab}, fold_ln={source.fold_ln}'
            + (", through a lens" if source.lens else "")
        )
        if self.null is None:
            return text
        count = self.n_specialised()
        return f"{text}; {count} ({count / len(self):.1%}) above the null's 99.9%"

    def _repr_html_(self) -> str:
        table = self.specialised(10)._repr_html_() if self.null is not None else ""
        return f"<p>{escape(repr(self))}</p>{table}"

    def _pole(self, pole: str) -> TopTokens:
        return self.positive if pole == "positive" else self.negative

    def _require(self, n: int, by: str) -> None:
        if by not in ORDERS:
            raise ValueError(f"by: expected one of {', '.join(map(repr, ORDERS))}, got {by!r}")
        if by == "prob":
            require_probabilities(self.score)
        if n < 1:
            raise ValueError(f"n: expected 1 or more, got {n}")

    def _specialised(self, quantile: float) -> Tensor:
        if self.null is None:
            raise ValueError("this map has no null to compare with: its directions were too few to shuffle")
        threshold = self.null.quantile(quantile)
        return torch.stack([self._pole(pole).z[..., 0] > threshold[:, None] for pole in POLES])

    def _key(self, pole: str, by: str) -> Float[Tensor, "layer neuron k"]:
        top = self._pole(pole)
        if by == "prob":
            return top.probs
        if by == "write":
            return top.write_z.abs()
        return torch.minimum(top.z, top.write_z.abs()) if by == "coherence" else top.z

    def _ranked(self, pole: str, mask: Tensor, by: str) -> list[tuple[float, tuple[int, int, int]]]:
        keys = self._key(pole, by)[mask].tolist()
        return [
            (key, (row, index, rank)) for key, (row, index, rank) in zip(keys, mask.nonzero().tolist(), strict=True)
        ]

    def _hits(self, pole: str, rows: Any, indices: Any, ranks: Any) -> tuple[Hit, ...]:
        return tuple(self._hit(pole, *place) for place in zip(rows, indices, ranks, strict=True))

    def _hit(self, pole: str, row: int, index: int, rank: int) -> Hit:
        top = self._pole(pole)
        logit, std = float(top.logits[row, index, rank]), float(self.std[row, index])
        log_prob = float(top.tau[row, index]) * logit - float(top.log_z[row, index])
        return Hit(
            neuron=self.neuron(row, index),
            pole=pole,
            rank=rank,
            token=self.vocab.string(int(top.ids[row, index, rank])),
            logit=logit,
            prob=float(np.exp(log_prob)),
            z=logit / std,
            write_z=float(top.write_z[row, index, rank]),
        )
