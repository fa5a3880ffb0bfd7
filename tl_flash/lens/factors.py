"""Sums over tokens of the Jacobians of a block's attention and of its MLP, in closed form.

A norm's derivative is r (1 - n n' / d), with its gain put into the matrix beside it (`norms.Norm`). Below, n and r are
those of the norm before, m and l those of the norm after, which Gemma 2 and 3 and OLMo 2 have, and every sum is over
the tokens given. All products that hold a token's own n or m are sums of outer products, so no Jacobian of a single
token is ever built.
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


def mlp_jacobian(
    entry: Entry,
    exit: Exit,
    slopes: Sequence[Float[Tensor, "token d_mlp"]],
    inputs: Sequence[Float[Tensor, "d_mlp d_model"]],
    W_out: Float[Tensor, "d_mlp d_model"],
) -> Float[Tensor, "d_model d_model"]:
    """The sum of l (1 - m m'/d) W_out' (sum over j of diag(a_j) X_j) r (1 - n n'/d).

    Args:
        entry: the norm before the MLP, [token].
        exit: the norm after it, [token].
        slopes: a_j, the derivative of hook_post by each pre-activation: of one where the MLP is ungated, of gate and up
            where it is gated (silu'(g) u and silu(g)).
        inputs: X_j, the matrix of each pre-activation, with the gain of the norm before.
        W_out: the output matrix, without the gain of the norm after.
    """
    (n, r), (m, l) = entry, exit  # noqa: E741
    d, weight = W_out.shape[1], l * r
    pairs = list(zip(slopes, inputs, strict=True))
    mixed = _sum((weight @ a)[:, None] * X for a, X in pairs)
    total = W_out.T @ mixed
    if n is not None:
        written = _sum(a * (n @ X.T) for a, X in pairs) @ W_out
        if m is not None:
            written = written - m * (m * written).sum(-1, keepdim=True) / d
        total = total - (weight[:, None] * written).T @ n / d
    if m is not None:
        seen = _sum((a * (m @ W_out.T)) @ X for a, X in pairs)
        total = total - (weight[:, None] * m).T @ seen / d
    return total


def attention_jacobian(
    entry: Entry,
    exit: Exit,
    pattern: Float[Tensor, "text head target source"],
    W_V: Float[Tensor, "head d_model d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "d_model d_model"]:
    """The sum over targets t, heads and sources s of l_t (1 - m_t m_t'/d) W_O' W_V' P_ts r_s (1 - n_s n_s'/d).

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
    weight = torch.einsum("bt,bhts->bhs", l, pattern) * r[:, None]
    core = weight.sum((0, 2))[:, None, None] * W_V  # [head, d_model, d_head]
    values = None
    if n is not None:
        values = torch.einsum("bsd,hdk->bhsk", n, W_V)
        core = core - torch.einsum("bsd,bhsk->hdk", n, weight[..., None] * values) / d
    total = torch.einsum("hke,hdk->ed", W_O, core)
    if m is not None:
        probed = torch.einsum("bte,hke->bhtk", m, W_O)
        reach = torch.einsum("bhts,bs->bht", pattern, r)
        seen = torch.einsum("bhtk,hdk->btd", reach[..., None] * probed, W_V)
        if n is not None and values is not None:
            through = (probed @ values.transpose(-1, -2) * pattern).sum(1) * r[:, None]  # [text, target, source]
            seen = seen - through @ n / d
        total = total - torch.einsum("bte,btd->ed", l[..., None] * m, seen) / d
    return total


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)
