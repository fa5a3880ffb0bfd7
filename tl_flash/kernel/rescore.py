"""Scores in float64 of a few chosen tokens: what the tokens named by the engine rest on.

Every score is multiplied and summed in the same order, so that equal columns of W_U have equal scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts
from tl_flash.kernel.reduce import has_triton
from tl_flash.kernel.unembedding import Unembedding

MOST_BYTES = 4 * 2**20  # of scratch: more pairs at a time do not stay in a cache


def pairs_within(u: Unembedding, max_bytes: int = MOST_BYTES) -> int:
    """How many scores to make at a time."""
    return max(min(max_bytes, MOST_BYTES) // pair_bytes(u), 16)


def pair_bytes(u: Unembedding) -> int:
    """Scratch bytes of one score: a column of W_U as held and in float64, and a direction."""
    return (u.W_U.element_size() + 16) * u.d_model


class Rescorer:
    """Scores directions, float64 [n, d_model], on tokens in float64, means not taken off."""

    def __init__(self, u: Unembedding, pairs: int):
        """`pairs`: how many scores are made at a time."""
        self.u, self.pairs, self._triton = u, pairs, has_triton(u.device)
        held = 0 if self._triton else pairs
        self._columns = torch.empty(held, u.d_model, dtype=u.W_U.dtype, device=u.device)
        self._wide, self._rows = torch.empty(2, held, u.d_model, dtype=torch.float64, device=u.device)

    def of_each(self, rows: Tensor, ids: Tensor) -> Tensor:
        """float64 [n, m]: scores of each row's own tokens, ids [n, m]; -inf where an id is -1."""
        if self._triton:
            from tl_flash.kernel import triton_kernels

            weights = self.u.W_U if self.u.by_token is None else self.u.by_token.T
            scores = triton_kernels.exact_scores(rows, ids, weights)
            return scores if self.u.column_scale is None else scores * self.u.column_scale[ids.clamp(min=0)]
        n, m = ids.shape
        tokens = ids.clamp(min=0)
        scores = torch.empty(n, m, dtype=torch.float64, device=rows.device)
        for some in parts(n, max(self.pairs // max(m, 1), 1)):
            for few in parts(m, self.pairs):
                of_rows = tokens[some, few]
                columns = self._gathered(of_rows.reshape(-1)).view(*of_rows.shape, -1)
                scores[some, few] = columns.mul_(rows[some, None]).sum(-1)
        if self.u.column_scale is not None:
            scores *= self.u.column_scale[tokens]
        return scores.masked_fill_(ids < 0, -math.inf)

    def of_some(self, rows: Tensor, ids: Tensor) -> Tensor:
        """What `of_each` returns, where most ids are -1. On a CPU only the others take time."""
        if ids.device.type != "cpu":
            return self.of_each(rows, ids)
        scores = torch.full((ids.numel(),), -math.inf, dtype=torch.float64)
        places = (ids.flatten() >= 0).nonzero()[:, 0]
        tokens, row = ids.flatten()[places, None], places // ids.shape[1]
        for few in parts(len(places), self.pairs):
            of_pairs = torch.index_select(rows, 0, row[few], out=self._rows[: len(tokens[few])])
            scores[places[few]] = self.of_each(of_pairs, tokens[few])[:, 0]
        return scores.view(ids.shape)

    def _gathered(self, tokens: Tensor) -> Tensor:
        """Columns of W_U in float64, as rows [m, d_model], in scratch memory."""
        columns, wide = self._columns[: len(tokens)], self._wide[: len(tokens)]
        if self.u.by_token is None:
            return wide.copy_(self.u.W_U.index_select(1, tokens).T)
        return wide.copy_(torch.index_select(self.u.by_token, 0, tokens, out=columns))
