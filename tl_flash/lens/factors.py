"""Sums over tokens of the Jacobians of a block's attention and of its MLP, in closed form.

A norm's derivative is r (1 - n n' / d), with its gain put into the matrix beside it (`norms.Norm`). Below, n and r are
those of the norm before, m and l those of the norm after, which Gemma 2 and 3 and OLMo 2 have, and every sum is over
the tokens given. All products that hold a token's own n or m are sums of outer products, so no Jacobian of a single
token is ever built; and what multiplies the weights alone is summed first, so that the weights meet it once, however
many batches there are. Sums of several batches add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Entry(NamedTuple):
    """The norm before a part, at each token."""

    n: Float[Tensor, "... d_model"] | None
    """The normalised residual stream; None where no norm is before the part."""
    r: Tensor
    """Over what it was divided by."""


class Exit(NamedTuple):
    """The norm after a part, at each token."""

    m: Float[Tensor, "... d_model"] | None
    """The normalised output of the part; None where no norm is after it."""
    l: Tensor  # noqa: E741
    """Over what it was divided by."""


class Sums(NamedTuple):
    """What is known of a part after some tokens."""

    inner: Tensor
    """What stands between the weights: of an MLP a number a matrix and neuron, of attention a matrix a head."""
    outer: Float[Tensor, "d_model d_model"]
    """The sum of all outer products of a token's own."""


def mlp_sums(
    entry: Entry,
    exit: Exit,
    slopes: Sequence[Float[Tensor, "token d_mlp"]],
    reads: Sequence[Float[Tensor, "token d_mlp"]],
    inputs: Sequence[Float[Tensor, "d_model d_mlp"]],
    W_out: Float[Tensor, "d_mlp d_model"],
    gain: Float[Tensor, " d_model"],
) -> Sums:
    """Of l (1 - m m'/d) W_out' (sum over j of diag(a_j) X_j) r (1 - n n'/d), with X_j = inputs[j]' diag(gain).

    Args:
        entry: the norm before the MLP, [token].
        exit: the norm after it, [token].
        slopes: a_j, the derivative of hook_post by each pre-activation: of one where the MLP is ungated, of gate and up
            where it is gated (silu'(g) u and silu(g)).
        reads: X_j n: the pre-activations without biases.
        inputs: the matrix of each pre-activation.
        W_out: the output matrix, without the gain of the norm after.
        gain: of the norm before.
    """
    (n, r), (m, l) = entry, exit  # noqa: E741
    d, weight = W_out.shape[1], l * r
    outer = torch.zeros(d, d, dtype=W_out.dtype, device=W_out.device)
    if n is not None:
        written = _sum(a * read for a, read in zip(slopes, reads, strict=True)) @ W_out
        if m is not None:
            written = written - m * (m * written).sum(-1, keepdim=True) / d
        outer -= (weight[:, None] * written).T @ n / d
    if m is not None:
        probed = m @ W_out.T
        seen = _sum((a * probed) @ W.T for a, W in zip(slopes, inputs, strict=True)) * gain
        outer -= (weight[:, None] * m).T @ seen / d
    return Sums(torch.stack([weight @ a for a in slopes]), outer)


def mlp_jacobian(
    sums: Sums,
    inputs: Sequence[Float[Tensor, "d_model d_mlp"]],
    W_out: Float[Tensor, "d_mlp d_model"],
    gain: Float[Tensor, " d_model"],
) -> Float[Tensor, "d_model d_model"]:
    """What `mlp_sums` is of, summed over all its tokens."""
    mixed = _sum(a[:, None] * W.T for a, W in zip(sums.inner, inputs, strict=True))
    return torch.addcmul(sums.outer, W_out.T @ mixed, gain)


def attention_sums(
    entry: Entry,
    exit: Exit,
    pattern: Float[Tensor, "text head target source"],
    W_V: Float[Tensor, "head d_model d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
) -> Sums:
    """Of l_t (1 - m_t m_t'/d) W_O' W_V' P_ts r_s (1 - n_s n_s'/d), over targets t, heads and sources s.

    The pattern P is held constant.

    Args:
        entry: the norm before attention, [text, source].
        exit: the norm after it, [text, target].
        pattern: of the targets and sources that count.
        W_V: a head's value matrix, with the gain of the norm before; heads that share one hold the same.
        W_O: a head's output matrix, without the gain of the norm after.
    """
    (n, r), (m, l) = entry, exit  # noqa: E741
    d = W_O.shape[-1]
    outer = torch.zeros(d, d, dtype=W_O.dtype, device=W_O.device)
    weight = torch.einsum("bt,bhts->bhs", l, pattern) * r[:, None]
    core = weight.sum((0, 2))[:, None, None] * W_V  # [head, d_model, d_head]
    values = None
    if n is not None:
        values = torch.einsum("bsd,hdk->bhsk", n, W_V)
        core = core - torch.einsum("bsd,bhsk->hdk", n, weight[..., None] * values) / d
    if m is not None:
        probed = torch.einsum("bte,hke->bhtk", m, W_O)
        reach = torch.einsum("bhts,bs->bht", pattern, r)
        seen = torch.einsum("bhtk,hdk->btd", reach[..., None] * probed, W_V)
        if n is not None and values is not None:
            through = (probed @ values.transpose(-1, -2) * pattern).sum(1) * r[:, None]  # [text, target, source]
            seen = seen - through @ n / d
        outer -= torch.einsum("bte,btd->ed", l[..., None] * m, seen) / d
    return Sums(core, outer)


def attention_jacobian(sums: Sums, W_O: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "d_model d_model"]:
    """What `attention_sums` is of, summed over all its tokens."""
    return torch.einsum("hke,hdk->ed", W_O, sums.inner) + sums.outer


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)
