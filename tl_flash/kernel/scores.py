"""Exact scores of chosen tokens, and moments over the vocabulary, without the other scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts, plain_arithmetic
from tl_flash.kernel.checks import expect_finite, expect_matrix, token_ids
from tl_flash.kernel.directions import Directions
from tl_flash.kernel.rescore import Rescorer, pairs_within
from tl_flash.kernel.unembedding import Unembedding

_AT_A_TIME = 4096  # rows or pairs, where nothing is as wide as the vocabulary


def token_scores(x: Tensor, ids: Tensor, unembedding: Unembedding) -> Tensor:
    """Score each direction on its own tokens, exactly: float32 [n, m] on the CPU; NaN for a zero direction.

    Args:
        x: [n, d_model] directions.
        ids: [n, m] token ids.
        unembedding: what `prepare` made.

    Raises:
        TypeError: x is not a float tensor, or ids holds something other than ids.
        ValueError: a shape, a non-finite direction, an id out of range.
    """
    u = unembedding
    expect_matrix("x", x, f"[n, {u.d_model}]", width=u.d_model)
    if ids.ndim != 2 or len(ids) != len(x):
        raise ValueError(f"ids: expected shape [{len(x)}, m], a row of ids for each of x, got {list(ids.shape)}")
    wanted = token_ids("ids", ids.flatten(), u.d_vocab).view(ids.shape).to(u.device)
    scores, rescorer = torch.empty(ids.shape, dtype=torch.float32), Rescorer(u, pairs_within(u))
    with torch.no_grad(), plain_arithmetic(u.device):
        for rows in parts(len(x), _AT_A_TIME):
            d = _checked(x[rows], None, u)
            exact = rescorer.of_each(d.rows, wanted[rows])
            exact = exact - d.mean[:, None] if u.score == "dot" else exact
            scores[rows] = exact.masked_fill(d.zero[:, None], math.nan)
    return scores


def moments(x: Tensor, unembedding: Unembedding) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each direction's scores, float32 [n] each on the CPU, without the scores.

    They are x . mean(W_U) and the length of R' x, with R R' the covariance of W_U's columns, made at the first call and
    kept. Those of a zero direction are NaN.

    Raises:
        TypeError: x is not a float tensor.
        ValueError: a shape, a non-finite direction.
    """
    u = unembedding
    expect_matrix("x", x, f"[n, {u.d_model}]", width=u.d_model)
    mean, std = torch.empty(2, len(x), dtype=torch.float32)
    with torch.no_grad(), plain_arithmetic(u.device):
        for rows in parts(len(x), _AT_A_TIME):
            d = _checked(x[rows], None, u)
            unit = (d.rows / d.length[:, None]).float()
            mean[rows] = d.mean.masked_fill(d.zero, math.nan)
            std[rows] = ((unit @ u.root).norm(dim=1).double() * d.length).masked_fill(d.zero, math.nan)
    return mean, std


def _checked(x: Tensor, norm: Tensor | None, u: Unembedding) -> Directions:
    d = Directions.of(x, norm, u)
    expect_finite(d.finite)
    return d
