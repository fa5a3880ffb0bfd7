"""Sums over the tokens of a text of the Jacobians of a block's attention and of its MLP, in closed form.

A norm's derivative is r (1 - n n' / d), with its gain put into the matrix beside it (`norms.Norm`). Below, n and r are
those of the norm before, m and l those of the norm after, which Gemma 2 and 3 and OLMo 2 have. All products that hold
a token's own n or m are sums of outer products, so no Jacobian of a single token is ever built; and what multiplies the
weights alone is summed first, so that a text meets the weights once. A target whose l is 0 does not count.
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

    def each(self, times: int) -> Entry:
        """Each text so many times in a row."""
        return Entry(None if self.n is None else each_of(self.n, times), each_of(self.r, times))


class Exit(NamedTuple):
    """The norm after a part, at each token."""

    m: Float[Tensor, "... d_model"] | None
    """The normalised output of the part; None where no norm is after it."""
    l: Tensor  # noqa: E741
    """Over what it was divided by."""

    def each(self, times: int) -> Exit:
        """Each text so many times in a row."""
        return Exit(None if self.m is None else each_of(self.m, times), each_of(self.l, times))


def each_of(tensor: Tensor, times: int) -> Tensor:
    """Each text so many times in a row."""
    return tensor[:, None].expand(-1, times, *tensor.shape[1:]).flatten(0, 1)


def mlp_jacobian(
    entry: Entry,
    exit: Exit,
    slopes: Sequence[Float[Tensor, "text token d_mlp"]],
    reads: Sequence[Float[Tensor, "text token d_mlp"]],
    inputs: Sequence[Float[Tensor, "d_model d_mlp"]],
    W_out: Float[Tensor, "d_mlp d_model"],
    gain: Float[Tensor, " d_model"],
) -> Float[Tensor, "text d_model d_model"]:
    """Of l (1 - m m'/d) W_out' (sum over j of diag(a_j) X_j) r (1 - n n'/d), with X_j = inputs[j]' diag(gain).

    Args:
        entry: the norm before the MLP, [text, token].
        exit: the norm after it, [text, token].
        slopes: a_j, the derivative of hook_post by each pre-activation: of one where the MLP is ungated, of gate and up
            where it is gated (silu'(g) u and silu(g)).
        reads: X_j n: the pre-activations without biases.
        inputs: the matrix of each pre-activation.
        W_out: the output matrix, without the gain of the norm after.
        gain: of the norm before.
    """
    (n, r), (m, l) = entry, exit  # noqa: E741
    d, weight = W_out.shape[1], l * r
    inputs = [W * gain[:, None] for W in inputs]
    active = [torch.einsum("bt,btm->bm", weight, a) for a in slopes]
    total = W_out.new_empty(len(weight), d, d)  # transposed: [text, from, to]
    mixed = torch.empty_like(inputs[0])
    for of_text, *of_inputs in zip(total, *active, strict=True):
        torch.mul(inputs[0], of_inputs[0], out=mixed)
        for W, a in zip(inputs[1:], of_inputs[1:], strict=True):
            mixed.addcmul_(W, a)
        torch.mm(mixed, W_out, out=of_text)
    if n is not None:
        written = _sum(a * read for a, read in zip(slopes, reads, strict=True)) @ W_out
        if m is not None:
            written = written - m * (m * written).sum(-1, keepdim=True) / d
        total.baddbmm_(n.mT, weight[..., None] * written, alpha=-1 / d)
    if m is not None:
        probed = m @ W_out.T
        seen = _sum((a * probed) @ W.T for a, W in zip(slopes, inputs, strict=True))
        total.baddbmm_(seen.mT, weight[..., None] * m, alpha=-1 / d)
    return total.mT


def attention_jacobian(
    entry: Entry,
    exit: Exit,
    pattern: Float[Tensor, "text head target source"],
    W_V: Float[Tensor, "head d_model d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "text d_model d_model"]:
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
    weight = torch.einsum("bt,bhts->bhs", l, pattern) * r[:, None]
    core = (weight.sum(-1)[..., None, None] * W_V.mT).flatten(1, 2)  # [text, head and d_head, d_model]
    values = None
    if n is not None:
        values = torch.einsum("bsd,hdk->bhsk", n, W_V)
        core.baddbmm_((weight[..., None] * values).mT.flatten(1, 2), n, alpha=-1 / d)
    total = W_O.flatten(0, 1).T @ core
    if m is not None:
        probed = torch.einsum("bte,hke->bhtk", m, W_O)
        reach = torch.einsum("bhts,bs->bht", pattern, r)
        seen = torch.einsum("bhtk,hdk->btd", reach[..., None] * probed, W_V)
        if n is not None and values is not None:
            through = (probed @ values.mT * pattern).sum(1) * r[:, None]  # [text, target, source]
            seen = seen - through @ n / d
        total.baddbmm_((l[..., None] * m).mT, seen, alpha=-1 / d)
    return total


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)
