"""Compare two maps neuron by neuron: pretrained with instruct, one checkpoint with the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_flash.maps.neuron_map import NeuronMap

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Comparison:
    """How much of one map another keeps; of the positive pole, as in the paper."""

    a: NeuronMap
    b: NeuronMap
    same_top: Bool[Tensor, "layer neuron"]
    """Whether both maps give the neuron the same top token."""
    overlap: Float[Tensor, "layer neuron"]
    """Jaccard index of the two sets of top k tokens: 0 without a common one, 1 where all are."""
    null_by_layer: Float[Tensor, " layer"]
    """Agreement expected of b's neurons shuffled within their layer: what frequent top tokens alone give."""

    @property
    def agreement(self) -> float:
        """Share of neurons with the same top token (Davies 2025 gives 75.4% for Llama 3.1 8B and its Instruct)."""
        return float(self.same_top.float().mean())

    @property
    def by_layer(self) -> Float[Tensor, " layer"]:
        """Agreement layer by layer."""
        return self.same_top.float().mean(1)

    @property
    def null(self) -> float:
        """Agreement expected of neurons shuffled within their layers, over all layers."""
        return float(self.null_by_layer.mean())

    def by_specialisation(self, parts: int = 4) -> pd.DataFrame:
        """Agreement by how specialised neurons are in map a, from the least to the most.

        Args:
            parts: how many equal parts of the neurons, ordered by their top z-score.

        Raises:
            ValueError: fewer than 1 part, or more than neurons.
        """
        import pandas as pd

        if not 1 <= parts <= self.same_top.numel():
            raise ValueError(f"parts: expected 1 to {self.same_top.numel()}, the number of neurons, got {parts}")
        z, same, overlap = (t.flatten() for t in (self.a.positive.z[..., 0], self.same_top.float(), self.overlap))
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

        if n < 1:
            raise ValueError(f"n: expected 1 or more, got {n}")
        z = torch.maximum(self.a.positive.z[..., 0], self.b.positive.z[..., 0]).masked_fill(self.same_top, -torch.inf)
        order = z.flatten().argsort(descending=True, stable=True)[: min(n, int((~self.same_top).sum()))]
        rows = []
        for row, index in ((int(flat) // self.a.d_mlp, int(flat) % self.a.d_mlp) for flat in order):
            record: dict[str, object] = {"neuron": str(self.a.neuron(row, index))}
            for name, map in (("a", self.a), ("b", self.b)):
                record[f"token_{name}"] = map.vocab.string(int(map.positive.ids[row, index, 0]))
                record[f"z_{name}"] = float(map.positive.z[row, index, 0])
            rows.append(record | {"overlap": float(self.overlap[row, index])})
        columns = ["neuron", "token_a", "z_a", "token_b", "z_b", "overlap"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a layer: agreement, its null, and the mean overlap."""
        import pandas as pd

        columns = {"agreement": self.by_layer, "null": self.null_by_layer, "overlap": self.overlap.mean(1)}
        return pd.DataFrame({"layer": self.a.layers} | {name: column.numpy() for name, column in columns.items()})

    def __repr__(self) -> str:
        return (
            f'{self.a.source.model} against {self.b.source.model}, side "{self.a.side}": {self.agreement:.1%} of '
            f"{self.same_top.numel()} neurons keep their top token ({self.null:.1%} if shuffled within their layers)"
        )

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
        b: a map of the same shape, vocabulary, side, score and folding, such as the instruct model's.

    Raises:
        TypeError: one is no map.
        ValueError: the maps differ in one of these; the message says in which.

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
    if a.vocab.strings and b.vocab.strings and a.vocab.strings != b.vocab.strings:
        first = int((a.vocab.names != b.vocab.names).argmax())
        raise ValueError(
            "b: expected a map of the same vocabulary as a; the first difference is token "
            f"{first}: {a.vocab.string(first)!r} in a, {b.vocab.string(first)!r} in b"
        )
    ids_a, ids_b = a.positive.ids, b.positive.ids
    common = (ids_a[..., :, None] == ids_b[..., None, :]).any(-1).sum(-1)
    counts_a, counts_b = (_counts(ids[..., 0], a.d_vocab) for ids in (ids_a, ids_b))
    return Comparison(
        a=a,
        b=b,
        same_top=ids_a[..., 0] == ids_b[..., 0],
        overlap=common / (2 * a.k - common),
        null_by_layer=((counts_a * counts_b).sum(1) / a.d_mlp**2).float(),
    )


def _must_agree(a: NeuronMap, b: NeuronMap) -> list[tuple[str, object, object]]:
    cosines = a.score == b.score == "cosine"
    return [
        ("layers", a.layers, b.layers),
        ("d_mlp", a.d_mlp, b.d_mlp),
        ("number of experts", a.n_experts, b.n_experts),
        ("k", a.k, b.k),
        ("d_vocab", a.d_vocab, b.d_vocab),
        ("side", a.side, b.side),
        ("score", a.score, b.score),
        ("fold_ln", a.source.fold_ln, b.source.fold_ln),
        ("use of a lens", a.source.lens is not None, b.source.lens is not None),
        ("center_unembed", cosines and a.source.center_unembed, cosines and b.source.center_unembed),
    ]


def _counts(top: Tensor, d_vocab: int) -> Float[Tensor, "layer d_vocab"]:
    """How many neurons of each layer have each token on top."""
    counts = torch.zeros(len(top), d_vocab, dtype=torch.float64)
    return counts.scatter_add_(1, top.long(), torch.ones_like(top, dtype=torch.float64))
