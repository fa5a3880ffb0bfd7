"""Scores of chosen tokens alone, exact or as z-scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts, pieces, plain_arithmetic
from tl_flash.kernel.checks import expect_finite, expect_matrix, token_ids
from tl_flash.kernel.directions import Directions
from tl_flash.kernel.reduce import has_triton
from tl_flash.kernel.rescore import Rescorer, pairs_within
from tl_flash.kernel.unembedding import Unembedding

_AT_A_TIME = {"cpu": 512, "cuda": 4096}  # rows, where nothing is as wide as the vocabulary


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
    wanted = _own_ids(x, ids, u)
    scores, rescorer = torch.empty(ids.shape, dtype=torch.float32), Rescorer(u, pairs_within(u))
    with torch.no_grad(), plain_arithmetic(u.device):
        for rows in parts(len(x), _AT_A_TIME[u.device.type]):
            d = _checked(x[rows], None, u)
            exact = rescorer.of_each(d.rows, wanted[rows])
            exact = exact - d.mean[:, None] if u.score == "dot" else exact
            scores[rows] = exact.masked_fill(d.zero[:, None], math.nan)
    return scores


def token_z(x: Tensor, ids: Tensor, unembedding: Unembedding) -> Tensor:
    """Z-score of each direction's own tokens in itself, in float32: [n, m] on the CPU; NaN for a zero direction.

    The standard deviation is the length of R' x, with R R' the covariance of W_U's columns, made at the first call and
    kept: no other token is scored.

    Args:
        x: [n, d_model] directions.
        ids: [n, m] token ids.
        unembedding: what `prepare` made.

    Raises:
        TypeError: x is not a float tensor, or ids holds something other than ids.
        ValueError: a shape, a non-finite direction, an id out of range.
    """
    u = unembedding
    wanted = _own_ids(x, ids, u)
    z = torch.empty(ids.shape, dtype=torch.float32)
    tokens = u.W_U.T if u.by_token is None else u.by_token
    with torch.no_grad(), plain_arithmetic(u.device):
        for rows in parts(len(x), _AT_A_TIME[u.device.type]):
            d = _checked(x[rows], None, u)
            unit, mean = (d.rows / d.length[:, None]).float(), (d.mean / d.length).float()[:, None]
            if has_triton(u.device):
                scores = (Rescorer(u, 0).of_each(d.rows, wanted[rows]) / d.length[:, None]).float()
            else:
                scores = _own_scores(unit, tokens, wanted[rows])
                if u.column_scale is not None:
                    scores *= u.column_scale[wanted[rows]].float()
            if u.column_scale is None:
                scores -= mean
            deviations = u.deviations(unit).float()[:, None]
            z[rows] = scores.div_(deviations).masked_fill_(d.zero[:, None], math.nan)
    return z


def _own_scores(unit: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
    """float32 [n, m]: each of unit, float32 [n, d_model], times its own of tokens [d_vocab, d_model], ids [n, m]."""
    scores = torch.empty(ids.shape, dtype=torch.float32, device=unit.device)
    for few in pieces(len(unit), 4 * unit.shape[1] * max(ids.shape[1], 1), unit.device):
        columns = tokens.index_select(0, ids[few].flatten()).float()
        torch.sum(columns.view(*ids[few].shape, unit.shape[1]).mul_(unit[few, None]), -1, out=scores[few])
    return scores


def widest_tokens(x: Tensor, count: int, unembedding: Unembedding) -> Tensor:
    """The reportable tokens whose scores are spread most, were the coordinates of the directions independent.

    By mean(x^2) . c^2, with c the token's column of W_U' less the mean of all; under "dot", in float32.

    Args:
        x: [n, d_model] directions.
        count: how many tokens.
        unembedding: what `prepare` made.

    Returns:
        Their ids, int64 [count or as many as are reportable], ascending, on W_U's device.

    Raises:
        TypeError: x is not a float tensor.
        ValueError: a shape, or an unembedding whose score is the cosine.
    """
    u = _dot(unembedding)
    expect_matrix("x", x, f"[n, {u.d_model}]", width=u.d_model)
    with torch.no_grad(), plain_arithmetic(u.device):
        weight = Directions.of(x, None, u).rows.square().mean(0)
        weight = (weight / weight.amax().clamp(min=1e-300)).float()
        across = -2 * weight * (u.mean_column / u.measures.size).float()
        spread = torch.empty(u.d_vocab, dtype=torch.float32, device=u.device)
        for part in pieces(u.d_vocab, 4 * u.d_model, u.device):
            W = u.W_U[:, part].float() / u.measures.size
            torch.add(across @ W, weight @ W.square_(), out=spread[part])
        spread[u.ignored] = -1
        return spread.topk(min(count, u.d_vocab - len(u.ignored))).indices.sort().values


def extreme_tokens(unembedding: Unembedding) -> Tensor:
    """The reportable tokens whose column of W_U has the greatest or the least value in some coordinate, ascending.

    Int64 [at most 2 d_model] ids, found once: the top tokens of directions that one coordinate carries.
    """
    u = unembedding

    def find() -> Tensor:
        tokens = u.reportable.nonzero()[:, 0]
        ends = [(u.W_U[part] if len(tokens) == u.d_vocab else u.W_U[part][:, tokens]) for part in parts(u.d_model, 16)]
        return tokens[torch.cat([each for of in ends for each in (of.argmax(1), of.argmin(1))]).unique()]

    return u.kept.once(("extreme tokens", tuple(u.ignored.tolist())), find)


def greatest_z(x: Tensor, ids: Tensor, unembedding: Unembedding) -> Tensor:
    """The greatest |z-score| among some tokens in each direction, float32 [n] on W_U's device; 0 in a zero direction.

    In float32, under "dot". W_U's columns are taken a piece at a time.

    Args:
        x: [n, d_model] directions.
        ids: [m], the tokens.
        unembedding: what `prepare` made.

    Raises:
        TypeError: x is not a float tensor, or ids holds something other than ids.
        ValueError: a shape, an id out of range, or an unembedding whose score is the cosine.
    """
    u = _dot(unembedding)
    expect_matrix("x", x, f"[n, {u.d_model}]", width=u.d_model)
    wanted = token_ids("ids", ids, u.d_vocab).to(u.device)
    with torch.no_grad(), plain_arithmetic(u.device):
        d = Directions.of(x, None, u)
        unit, mean = (d.rows / d.length[:, None]).float(), (d.mean / d.length).float()[:, None]
        tokens = u.W_U.T if u.by_token is None else u.by_token
        most = torch.zeros(len(x), dtype=torch.float32, device=u.device)
        for part in pieces(len(wanted), 4 * u.d_model, u.device):
            scores = torch.addmm(mean, unit, tokens.index_select(0, wanted[part]).T.float(), beta=-1)
            torch.maximum(most, scores.abs_().amax(1), out=most)
        return (most / u.deviations(unit)).float().masked_fill_(d.zero, 0)


def _own_ids(x: Tensor, ids: Tensor, u: Unembedding) -> Tensor:
    expect_matrix("x", x, f"[n, {u.d_model}]", width=u.d_model)
    if ids.ndim != 2 or len(ids) != len(x):
        raise ValueError(f"ids: expected shape [{len(x)}, m], a row of ids for each of x, got {list(ids.shape)}")
    return token_ids("ids", ids.flatten(), u.d_vocab).view(ids.shape).to(u.device)


def _dot(unembedding: Unembedding) -> Unembedding:
    if unembedding.score != "dot":
        raise ValueError(f'unembedding: expected score "dot", got {unembedding.score!r}')
    return unembedding


def _checked(x: Tensor, norm: Tensor | None, u: Unembedding) -> Directions:
    d = Directions.of(x, norm, u)
    expect_finite(d.finite)
    return d
