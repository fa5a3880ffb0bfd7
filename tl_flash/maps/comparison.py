"""Compare two maps neuron by neuron: pretrained with instruct, one checkpoint with the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from tl_flash.maps.neuron_map import NeuronMap
from tl_flash.maps.search import require_count
from tl_flash.names import shown_model
from tl_flash.vocab import Vocab

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Comparison:
    """How much of one map another keeps; of the positive pole, as in the paper, over the tokens that both have."""

    a: NeuronMap
    b: NeuronMap
    n_tokens: int
    """Tokens that both vocabularies have, by their strings."""
    ids: Int32[Tensor, "map layer neuron k"]
    """Top tokens of a and of b, both by a's ids; -1 for a token that the other map's vocabulary lacks."""
    compared: Bool[Tensor, "layer neuron"]
    """Where both list a token that both have; not for a zero direction."""
    same_top: Bool[Tensor, "layer neuron"]
    """Whether both maps give the neuron the same top token."""
    overlap: Float[Tensor, "layer neuron"]
    """Jaccard index of the two sets of top k tokens: 0 without a common one, 1 where all are; NaN if not compared."""
    null_by_layer: Float[Tensor, " layer"]
    """Agreement expected of b's neurons shuffled within their layer: what frequent top tokens alone give."""

    @property
    def agreement(self) -> float:
        """Share of neurons with the same top token (Davies 2025 gives 75.4% for Llama 3.1 8B and its Instruct)."""
        return float(self.same_top[self.compared].float().mean())

    @property
    def by_layer(self) -> Float[Tensor, " layer"]:
        """Agreement layer by layer."""
        return self.same_top.sum(1) / self.compared.sum(1)

    @property
    def null(self) -> float:
        """Agreement expected of neurons shuffled within their layers, over all layers."""
        weights = self.compared.sum(1)
        return float((self.null_by_layer.nan_to_num(0) * weights).sum() / weights.sum())

    def by_specialisation(self, parts: int = 4) -> pd.DataFrame:
        """Agreement by how specialised neurons are in map a, from the least to the most.

        Args:
            parts: how many equal parts of the neurons, ordered by their top z-score.

        Raises:
            ValueError: fewer than 1 part, or more than neurons.
        """
        import pandas as pd

        n = int(self.compared.sum())
        require_count("parts", parts)
        if parts > n:
            raise ValueError(f"parts: expected 1 to {n}, the number of neurons, got {parts}")
        tops = self.a.positive.z[..., 0], self.same_top.float(), self.overlap
        z, same, overlap = (of_neurons[self.compared] for of_neurons in tops)
        rows = [
            {
                "z_from": float(z[part].min()),
                "z_to": float(z[part].max()),
                "neurons": len(part),
                "agreement": float(same[part].mean()),
                "overlap": float(overlap[part].mean()),
            }
            for part in z.argsort(stable=True).tensor_split(parts)
        ]
        return pd.DataFrame(rows)

    def changed(self, n: int = 20) -> pd.DataFrame:
        """The neurons with another top token in b, those first that either map is surest of.

        Returns:
            A pandas frame, a row a neuron, with its top token and z-score in a and in b, and the overlap.

        Raises:
            ValueError: n below 1.
        """
        import pandas as pd

        require_count("n", n)
        differ, first = self.compared & ~self.same_top, _first(self.ids)
        tops = [
            map.positive.z.gather(-1, at[..., None])[..., 0] for map, at in zip((self.a, self.b), first, strict=True)
        ]
        z = torch.maximum(*tops).masked_fill(~differ, -torch.inf)
        order = z.flatten().argsort(descending=True, stable=True)[: min(n, int(differ.sum()))]
        rows = []
        for row, index in ((int(flat) // self.a.d_mlp, int(flat) % self.a.d_mlp) for flat in order):
            record: dict[str, object] = {"neuron": str(self.a.neuron(row, index))}
            for name, ids, at, top in zip(("a", "b"), self.ids, first, tops, strict=True):
                record[f"token_{name}"] = self.a.vocab.string(int(ids[row, index, at[row, index]]))
                record[f"z_{name}"] = float(top[row, index])
            rows.append(record | {"overlap": float(self.overlap[row, index])})
        columns = ["neuron", "token_a", "z_a", "token_b", "z_b", "overlap"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a layer: agreement, its null, and the mean overlap."""
        import pandas as pd

        columns = {"agreement": self.by_layer, "null": self.null_by_layer, "overlap": self.overlap.nanmean(1)}
        return pd.DataFrame({"layer": self.a.layers} | {name: column.numpy() for name, column in columns.items()})

    def __repr__(self) -> str:
        a, b = (shown_model(map.source.model) for map in (self.a, self.b))
        return (
            f'{a} against {b}, side "{self.a.side}": {self.agreement:.1%} of '
            f"{int(self.compared.sum())} neurons keep their top token ({self.null:.1%} if shuffled within their layers)"
            + self._across()
            + ("" if self.n_tokens == self.a.d_vocab == self.b.d_vocab else f", over {self.n_tokens} tokens of both")
        )

    def _across(self) -> str:
        """How the two were stored, where that differs."""
        stored = [map.source.stored or map.source.dtype for map in (self.a, self.b)]
        return "" if stored[0] == stored[1] else f", across quantisations ({stored[0]} against {stored[1]})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.to_frame().to_string(index=False, float_format='{:.3f}'.format)}"

    def _repr_html_(self) -> str:
        from html import escape

        frame = self.to_frame().to_html(index=False, border=0, float_format="{:.3f}".format)
        return f"<p>{escape(repr(self))}</p>{frame}"


def compare(a: NeuronMap, b: NeuronMap) -> Comparison:
    """Compare two maps neuron by neuron (Davies 2025, arXiv 2501.02688: 75.4% of neurons keep their top token).

    Args:
        a: a map, such as the pretrained model's.
        b: a map of the same shape, side, score and folding, such as the instruct model's. Where it has other tokens
            (a fine-tune that added or renamed some) the comparison is over those that both have, by their strings.

    Raises:
        TypeError: one is no map.
        ValueError: the maps differ in one of these, the message says in which; or they have no token in common.

    Example:
        >>> neurons = flash_decode(model)
        >>> compare(neurons, neurons).agreement
        1.0
    """
    for name, map in (("a", a), ("b", b)):
        if not isinstance(map, NeuronMap):
            raise TypeError(f"{name}: expected a NeuronMap, as flash_decode makes them, got {type(map).__name__}")
    for what, of_a, of_b in _must_agree(a, b):
        if of_a != of_b:
            raise ValueError(f"b: expected a map of the same {what} as a, {of_a}; got {of_b}. Decode both alike")
    ids_of_a = _ids_of_a(a.vocab, b.vocab)
    both = ids_of_a[ids_of_a >= 0]
    own = torch.full((a.d_vocab + 1,), -1, dtype=torch.int32)
    own[both.long()] = both
    ids = torch.stack([own[a.positive.ids.long()], ids_of_a[b.positive.ids.long()]])
    top_a, top_b = (ids.gather(-1, _first(ids)[..., None]))[..., 0]
    compared = (top_a >= 0) & (top_b >= 0)
    in_both = ((ids[0][..., :, None] == ids[1][..., None, :]) & (ids[0][..., :, None] >= 0)).sum((-1, -2))
    counts = [_counts(top, compared, a.d_vocab) for top in (top_a, top_b)]
    return Comparison(
        a=a,
        b=b,
        n_tokens=len(both),
        ids=ids,
        compared=compared,
        same_top=compared & (top_a == top_b),
        overlap=(in_both / ((ids >= 0).sum((0, -1)) - in_both)).masked_fill(~compared, torch.nan),
        null_by_layer=((counts[0] * counts[1]).sum(1) / compared.sum(1) ** 2).float(),
    )


def _first(ids: Int32[Tensor, "map layer neuron k"]) -> Int64[Tensor, "map layer neuron"]:
    """The rank of each neuron's first token that both maps have; 0 without one."""
    return (ids >= 0).to(torch.uint8).argmax(-1)


def _ids_of_a(a: Vocab, b: Vocab) -> Int32[Tensor, " id"]:
    """The ids in a of b's tokens, -1 for those that a lacks; the last is that of id -1.

    Tokens are matched by their strings; where several print alike, by id.

    Raises:
        ValueError: no token is in both, or nothing tells which are.
    """
    ids = torch.full((b.d_vocab + 1,), -1, dtype=torch.int32)
    if not (a.strings and b.strings) or a.strings == b.strings:
        if a.d_vocab != b.d_vocab:
            raise ValueError(
                f"b: expected a map of the same d_vocab as a, {a.d_vocab}, or strings to match the tokens by; got "
                f"{b.d_vocab}. Decode both with their tokenizers"
            )
        ids[:-1] = torch.arange(b.d_vocab)
        return ids
    in_a, in_b = (_by_string(vocab.strings) for vocab in (a, b))
    for string, own in in_b.items():
        theirs = in_a.get(string, [])
        same = set(own) & set(theirs)
        pairs = zip(own, theirs, strict=True) if len(own) == len(theirs) == 1 else zip(same, same, strict=True)
        for id_b, id_a in pairs:
            ids[id_b] = id_a
    if not (ids >= 0).any():
        raise ValueError("b: expected a map with tokens that a has too, by their strings; got none")
    return ids


def _by_string(strings: Sequence[str | None]) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {}
    for id, string in enumerate(strings):
        if string is not None:
            ids.setdefault(string, []).append(id)
    return ids


def _must_agree(a: NeuronMap, b: NeuronMap) -> list[tuple[str, object, object]]:
    cosines = a.score == b.score == "cosine"
    return [
        ("layers", a.layers, b.layers),
        ("d_mlp", a.d_mlp, b.d_mlp),
        ("number of experts", a.n_experts, b.n_experts),
        ("k", a.k, b.k),
        ("side", a.side, b.side),
        ("score", a.score, b.score),
        ("fold_ln", a.source.fold_ln, b.source.fold_ln),
        ("use of a lens", a.source.lens is not None, b.source.lens is not None),
        ("center_unembed", cosines and a.source.center_unembed, cosines and b.source.center_unembed),
    ]


def _counts(top: Tensor, compared: Tensor, d_vocab: int) -> Float[Tensor, "layer d_vocab"]:
    """How many of the neurons compared, in each layer, have each token on top."""
    counts = torch.zeros(len(top), d_vocab, dtype=torch.float64)
    return counts.scatter_add_(1, top.long().clamp(min=0), compared.double())
