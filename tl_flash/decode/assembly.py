"""What the engine read, as a map: the parts that decodes of models and of free directions have in common."""

from __future__ import annotations

import functools
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash import kernel
from tl_flash.kernel import Readout, Unembedding
from tl_flash.maps import NeuronMap, Null, Source, TopTokens, Tracked, tau_of
from tl_flash.vocab import Vocab


def rows_of(readout: Readout, rows: slice) -> Readout:
    """The same readout of some of its rows."""
    return Readout(
        ids=readout.ids[:, rows],
        logits=readout.logits[:, rows],
        log_z=readout.log_z[:, rows],
        norm=readout.norm[rows],
        mean=readout.mean[rows],
        std=readout.std[rows],
        kurtosis=readout.kurtosis[rows],
        tracked=readout.tracked[rows],
        repaired=readout.repaired,
    )


def divisor(rows: Float[Tensor, "n d_model"], *, centred: bool, final_norm: bool) -> Float[Tensor, " n"] | None:
    """What tau = sqrt(d_model) / divisor is to divide by, where that is not the length that the engine finds itself.

    Args:
        rows: directions.
        centred: the final norm centres, and the rows are not centred.
        final_norm: there is one; without it tau is 1.
    """
    if not final_norm:
        return rows.new_full((len(rows),), rows.shape[1] ** 0.5, dtype=torch.float32)
    return (rows - rows.mean(-1, keepdim=True)).norm(dim=-1) if centred else None


def with_lengths(readout: Readout, rows: Float[Tensor, "n d_model"]) -> Readout:
    """The same readout with the rows' own lengths for norms."""
    return replace(readout, norm=rows.double().norm(dim=-1).float().cpu())


def is_centred(unembedding: Unembedding) -> bool:
    """Whether the columns of W_U have mean zero, as TransformerLens's `center_unembed` leaves them."""
    of = unembedding.measures if unembedding.score == "dot" else kernel.prepare(unembedding.W_U).measures
    return float(of.mean_column.norm()) <= 1e-4 * of.size


def z_of(readout: Readout) -> Float[Tensor, "2 n k"]:
    """Z-scores of each direction's listed tokens in itself."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float32)[:, None, None]
    return signs * readout.logits / readout.std[:, None]


def write_z(writes: Float[Tensor, "n d_model"], ids: Tensor, unembedding: Unembedding) -> Float[Tensor, "2 n k"]:
    """Z-scores of each neuron's listed tokens in its own write direction."""
    _, n, k = ids.shape
    listed = ids.clamp(min=0)  # a neuron that reads nothing may yet write
    z = kernel.token_z(writes, listed.permute(1, 0, 2).reshape(n, 2 * k), unembedding)
    return z.reshape(n, 2, k).permute(1, 0, 2).masked_fill(ids < 0, torch.nan)


def assemble(
    tensors: dict[str, Tensor],
    null: Null | None,
    tracked: list[int],
    vocab: Vocab,
    *,
    side: str,
    score: str,
    n_layers: int,
    layers: tuple[int, ...],
    n_experts: int | None,
    d_model: int,
    source: Source,
) -> NeuronMap:
    """A map of a readout's tensors and `write_z`, with a first axis of layers."""
    norm, std = tensors["norm"], tensors["std"]
    positive, negative = (
        TopTokens(
            **{name: tensors[name][:, pole].contiguous() for name in ("ids", "logits", "log_z", "write_z")},
            std=std,
            tau=tau_of(norm, d_model, final_norm=source.final_norm),
            vocab=vocab,
            score=score,
        )
        for pole in (0, 1)
    )
    return NeuronMap(
        side=side,
        score=score,
        n_layers=n_layers,
        layers=layers,
        n_experts=n_experts,
        d_model=d_model,
        source=source,
        vocab=vocab,
        positive=positive,
        negative=negative,
        norm=norm,
        mean=tensors["mean"],
        std=std,
        kurtosis=tensors["kurtosis"],
        null=null,
        tracked=Tracked(tracked, tensors["tracked"].permute(2, 0, 1).contiguous(), vocab),
    )


@functools.cache
def versions() -> dict[str, str]:
    """Of what a result depends on."""
    found = {}
    for package in ("tl_flash", "torch", "transformer-lens", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
