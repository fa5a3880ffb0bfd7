"""Two passes of the engine as Triton kernels, for GPUs: what `reduce` and `rescore` do in torch.

With TRITON_INTERPRET=1 they run on a CPU, which is how the tests compare them where there is no GPU.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportMissingImports=false, reportOperatorIssue=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tl_flash.kernel.reduce import Reduced

LEAST = tl.constexpr(-3e38)  # of a block that no token is named from
_BLOCKS = 128  # blocks that one program reduces
_TOKENS, _WIDTH = 16, 256  # tokens that one program scores, and how much of their columns it reads at a time


@triton.jit
def _reduce(
    scores, row_stride, never, mean, slope, extremes, sums, d_vocab, blocks,
    GROUP: tl.constexpr, BLOCKS: tl.constexpr, NEVER: tl.constexpr, LOGS: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, pieces = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    block = piece * BLOCKS + tl.arange(0, BLOCKS)
    token = tl.arange(0, GROUP)[:, None] * blocks + block[None]
    real = (block < blocks)[None] & (token < d_vocab)
    score = tl.load(scores + row * row_stride + token, mask=real, other=0.0).to(tl.float32)
    named = real
    if NEVER:
        named = real & (tl.load(never + token, mask=real, other=1) == 0)
    tl.store(extremes + row * blocks + block, tl.max(tl.where(named, score, LEAST), 0), mask=block < blocks)
    tl.store(extremes + (n + row) * blocks + block, tl.max(tl.where(named, -score, LEAST), 0), mask=block < blocks)

    middle = tl.load(mean + row)
    centred = tl.where(real, score - middle, 0.0)
    square = centred * centred
    out = sums + row * pieces + piece
    plane = n * pieces
    tl.store(out, tl.sum(square))
    tl.store(out + plane, tl.sum(square * square))
    if LOGS:
        steep = tl.load(slope + row)
        top = tl.max(tl.max(tl.where(real, score, float("-inf")), 0))
        bottom = tl.min(tl.min(tl.where(real, score, float("inf")), 0))
        positive = tl.sum(tl.where(real, tl.exp((score - top) * steep), 0.0))
        negative = tl.sum(tl.where(real, tl.exp((bottom - score) * steep), 0.0))
        tl.store(out + 2 * plane, tl.log(positive) + (top - middle) * steep)
        tl.store(out + 3 * plane, tl.log(negative) + (middle - bottom) * steep)
        above = tl.sum(tl.where(real, tl.exp((score - top) * steep) * centred, 0.0))
        below = tl.sum(tl.where(real, tl.exp((bottom - score) * steep) * centred, 0.0))
        tl.store(out + 4 * plane, above / positive)
        tl.store(out + 5 * plane, -below / negative)


def reduce(scores: Tensor, mean: Tensor, slope: Tensor | None, never: Tensor | None, blocks: int) -> Reduced:
    """`reduce.reduce` in one pass over scores [n, d_vocab]; nothing overflows, so no row is done twice.

    `mean` is always given; `never` is bool [d_vocab].
    """
    n, d_vocab = scores.shape
    pieces = triton.cdiv(blocks, _BLOCKS)
    extremes = torch.empty(2, n, blocks, dtype=torch.float32, device=scores.device)
    sums = torch.empty(6, n, pieces, dtype=torch.float32, device=scores.device)
    _reduce[(n, pieces)](
        scores, scores.stride(0), scores if never is None else never.view(torch.uint8),
        mean, mean if slope is None else slope, extremes, sums, d_vocab, blocks,
        GROUP=triton.next_power_of_2(triton.cdiv(d_vocab, blocks)), BLOCKS=_BLOCKS,
        NEVER=never is not None, LOGS=slope is not None,
    )  # fmt: skip
    squares, fourths = sums[:2].sum(-1, dtype=torch.float64)
    if slope is None:
        nothing = torch.full((2, n), math.nan, dtype=torch.float64, device=scores.device)
        return Reduced(extremes, squares, fourths, nothing, nothing)
    logs = sums[2:4].double()
    tilted = (logs.softmax(-1) * sums[4:]).sum(-1)
    return Reduced(extremes, squares, fourths, logs.logsumexp(-1), tilted)


@triton.jit
def _exact(rows, weights, stride_d, stride_v, ids, out, m, d_model, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    token = tl.load(ids + row * m + place, mask=place < m, other=-1).to(tl.int64)
    total = tl.zeros([TOKENS, WIDTH], tl.float64)
    for start in range(0, d_model, WIDTH):
        d = start + tl.arange(0, WIDTH)
        x = tl.load(rows + row * d_model + d, mask=d < d_model, other=0.0)
        at = weights + d[None].to(tl.int64) * stride_d + token[:, None] * stride_v
        wanted = (token >= 0)[:, None] & (d < d_model)[None]
        total += tl.load(at, mask=wanted, other=0.0).to(tl.float64) * x[None]
    tl.store(out + row * m + place, tl.where(token >= 0, tl.sum(total, 1), float("-inf")), mask=place < m)


def exact_scores(rows: Tensor, ids: Tensor, W_U: Tensor) -> Tensor:
    """float64 [n, m]: each of rows, float64 [n, d_model], times its own columns of W_U, ids [n, m] (-1: -inf)."""
    n, m = ids.shape
    out = torch.empty(n, m, dtype=torch.float64, device=rows.device)
    _exact[(n, triton.cdiv(m, _TOKENS))](
        rows.contiguous(), W_U, W_U.stride(0), W_U.stride(1), ids.contiguous(), out, m, rows.shape[1],
        TOKENS=_TOKENS, WIDTH=_WIDTH,
    )  # fmt: skip
    return out
