"""Three passes of the engine as Triton kernels, for GPUs: what is done in torch to reduce, to select and to rescore.

With TRITON_INTERPRET=1 they run on a CPU, which is how the tests compare them where there is no GPU.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false
# pyright: reportOperatorIssue=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tl_flash.kernel.reduce import Reduced

LEAST = tl.constexpr(-3e38)  # of a block that no token is named from
FAR = tl.constexpr(-1e30)  # below every score, and times a slope still finite
LOG2_E = tl.constexpr(1.4426950408889634)
_BLOCKS, _CHUNK, _WARPS = 512, 4, 2  # blocks that one program reduces, tokens of each at a time, and its warps
_MOST_BLOCKS, _MOST_CANDIDATES = 8192, 128
_TOKENS, _WIDTH = 32, 128  # tokens that one program scores, and how much of their columns it reads at a time


@triton.jit
def _reduce(
    scores, row_stride, named, mean, slope, extremes, sums, d_vocab, blocks,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr, NAMED: tl.constexpr, LOGS: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, pieces = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    block = piece * BLOCKS + tl.arange(0, BLOCKS)
    there, middle = block < blocks, tl.load(mean + row)
    high, low = tl.full([BLOCKS], LEAST, tl.float32), tl.full([BLOCKS], LEAST, tl.float32)
    top, bottom = tl.where(there, FAR, 0.0), tl.where(there, FAR, 0.0)
    squares, fourths = tl.zeros([BLOCKS], tl.float32), tl.zeros([BLOCKS], tl.float32)
    up, above = tl.zeros([BLOCKS], tl.float32), tl.zeros([BLOCKS], tl.float32)
    down, below = tl.zeros([BLOCKS], tl.float32), tl.zeros([BLOCKS], tl.float32)
    steep = tl.load(slope + row) * LOG2_E
    for start in range(0, SIZE, CHUNK):
        token = (start + tl.arange(0, CHUNK))[:, None] * blocks + block[None]
        real = there[None] & (token < d_vocab)
        score = tl.load(scores + row * row_stride + token, mask=there[None], other=0.0).to(tl.float32)
        able = real
        if NAMED:
            able = tl.load(named + token, mask=there[None], other=0) != 0
        high = tl.maximum(high, tl.max(tl.where(able, score, LEAST), 0))
        low = tl.maximum(low, tl.max(tl.where(able, -score, LEAST), 0))
        centred = tl.where(real, score, middle) - middle
        square = centred * centred
        squares += tl.sum(square, 0)
        fourths += tl.sum(square * square, 0)
        if LOGS:  # beside the greatest so far, so that nothing overflows
            before_top, before_bottom = top, bottom
            above_mean, below_mean = tl.where(real, centred, FAR), tl.where(real, -centred, FAR)
            top, bottom = tl.maximum(top, tl.max(above_mean, 0)), tl.maximum(bottom, tl.max(below_mean, 0))
            ups, downs = tl.exp2((above_mean - top[None]) * steep), tl.exp2((below_mean - bottom[None]) * steep)
            kept_up, kept_down = tl.exp2((before_top - top) * steep), tl.exp2((before_bottom - bottom) * steep)
            up, above = up * kept_up + tl.sum(ups, 0), above * kept_up + tl.sum(ups * centred, 0)
            down, below = down * kept_down + tl.sum(downs, 0), below * kept_down - tl.sum(downs * centred, 0)
    tl.store(extremes + row * blocks + block, high, mask=there)
    tl.store(extremes + (n + row) * blocks + block, low, mask=there)
    out, plane = sums + row * pieces + piece, n * pieces
    tl.store(out, tl.sum(squares))
    tl.store(out + plane, tl.sum(fourths))
    if LOGS:
        top, bottom = tl.where(there, top, FAR), tl.where(there, bottom, FAR)
        most, least = tl.max(top), tl.max(bottom)
        share_up, share_down = tl.exp2((top - most) * steep), tl.exp2((bottom - least) * steep)
        all_up, all_down = tl.sum(up * share_up), tl.sum(down * share_down)
        tl.store(out + 2 * plane, (tl.log2(all_up) + most * steep) / LOG2_E)
        tl.store(out + 3 * plane, (tl.log2(all_down) + least * steep) / LOG2_E)
        tl.store(out + 4 * plane, tl.sum(above * share_up) / all_up)
        tl.store(out + 5 * plane, tl.sum(below * share_down) / all_down)


def reduce(
    scores: Tensor, d_vocab: int, blocks: int, mean: Tensor, slope: Tensor | None, named: Tensor | None
) -> Reduced:
    """`reduce.reduce` in one pass; nothing overflows, so no row is done twice.

    Args:
        scores: [n, size * blocks], size a power of two; what is not a token's may be anything.
        d_vocab: how many are scores of tokens.
        blocks: how many there are; token t is in block t mod blocks. Loads are wide where they are a multiple of 16.
        mean: float32 [n, 1].
        slope: float32 [n, 1], or None where no log_z is wanted.
        named: bool [size * blocks], tokens that an extreme may be of; None where all are.
    """
    n, size = len(scores), scores.shape[1] // blocks
    pieces = triton.cdiv(blocks, _BLOCKS)
    extremes = torch.empty(2, n, blocks, dtype=torch.float32, device=scores.device)
    sums = torch.empty(6, n, pieces, dtype=torch.float32, device=scores.device)
    with torch.cuda.device_of(scores):
        _reduce[(n, pieces)](
            scores, scores.stride(0), scores if named is None else named.view(torch.uint8),
            mean, mean if slope is None else slope, extremes, sums, d_vocab, blocks,
            SIZE=size, CHUNK=_CHUNK, BLOCKS=_BLOCKS, NAMED=named is not None, LOGS=slope is not None, num_warps=_WARPS,
        )  # fmt: skip
    squares, fourths = sums[:2].sum(-1, dtype=torch.float64)
    if slope is None:
        nothing = torch.full((2, n), math.nan, dtype=torch.float64, device=scores.device)
        return Reduced(extremes, squares, fourths, nothing, nothing)
    logs = sums[2:4].double()
    tilted = (logs.softmax(-1) * sums[4:]).sum(-1)
    return Reduced(extremes, squares, fourths, logs.logsumexp(-1), tilted)


@triton.jit
def _bound(score, length, fixed, lost, reach, rounding, underflow):
    return score + (tl.abs(score) * rounding + underflow + length * fixed + lost * reach)


@triton.jit
def _greatest(values, count, COUNT: tl.constexpr):
    """Places [COUNT] of the `count` greatest, these, and the greatest left."""
    at, rank = tl.arange(0, values.shape[0]), tl.arange(0, COUNT)
    places, best = tl.zeros([COUNT], tl.int32), tl.full([COUNT], float("-inf"), tl.float32)
    for i in range(count):
        most, place = tl.max(values, 0, return_indices=True)
        places, best = tl.where(rank == i, place, places), tl.where(rank == i, most, best)
        values = tl.where(at == place, float("-inf"), values)
    return places, best, tl.max(values, 0)


@triton.jit
def _select(
    scores, row_stride, extremes, fixed, fixed_blocks, reach, reach_blocks, length, lost, named,
    tokens, uppers, outside, d_vocab, blocks, count, rounding, underflow,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr, NAMED: tl.constexpr,
):  # fmt: skip
    row, pole = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.num_programs(0).to(tl.int64)
    own_length, own_lost = tl.load(length + row), tl.load(lost + row)

    block = tl.arange(0, BLOCKS)
    there = block < blocks
    most = tl.load(extremes + (pole * n + row) * blocks + block, mask=there, other=LEAST)
    of_fixed, of_reach = (tl.load(fixed_blocks + block, mask=there), tl.load(reach_blocks + block, mask=there))
    upper = _bound(most, own_length, of_fixed, own_lost, of_reach, rounding, underflow)
    chosen, _, left_blocks = _greatest(tl.where(there, upper, float("-inf")), count, COUNT)

    token = tl.arange(0, SIZE)[:, None] * blocks + chosen[None]
    real = (token < d_vocab) & (tl.arange(0, COUNT) < count)[None]
    score = tl.load(scores + row * row_stride + token, mask=real, other=0.0).to(tl.float32)
    score = tl.where(pole == 0, score, -score)
    able = real
    if NAMED:
        able = tl.load(named + token, mask=real, other=0) != 0
    of_fixed, of_reach = tl.load(fixed + token, mask=real, other=0.0), tl.load(reach + token, mask=real, other=0.0)
    upper = _bound(score, own_length, of_fixed, own_lost, of_reach, rounding, underflow)
    upper = tl.reshape(tl.where(able, upper, float("-inf")), [SIZE * COUNT])
    places, best, left_tokens = _greatest(upper, count, COUNT)

    rank = tl.arange(0, COUNT)
    which = tl.sum(tl.where((places % COUNT)[:, None] == rank[None], chosen[None], 0), 1)
    found = tl.minimum((places // COUNT) * blocks + which, d_vocab - 1)
    out = (row * 2 + pole) * count + rank
    tl.store(tokens + out, found.to(tl.int64), mask=rank < count)
    tl.store(uppers + out, best, mask=rank < count)
    tl.store(outside + row * 2 + pole, tl.maximum(left_blocks, left_tokens))


def selects(blocks: int, count: int) -> bool:
    """Whether `select` takes so many candidates of so many blocks: all of them are held in registers."""
    return 2 * count <= blocks <= _MOST_BLOCKS and count <= _MOST_CANDIDATES


def select(
    scores: Tensor,
    d_vocab: int,
    extremes: Tensor,
    fixed: tuple[Tensor, Tensor],
    reach: tuple[Tensor, Tensor],
    length: Tensor,
    lost: Tensor,
    named: Tensor | None,
    count: int,
    rounding: float,
    underflow: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of greatest upper bound at both poles, looked for in the blocks of greatest upper bound.

    Args:
        scores: as `reduce` takes them.
        d_vocab: how many are scores of tokens.
        extremes: those of `Reduced`.
        fixed: float32, errors for each unit of a row's length: of tokens [d_vocab], of blocks at most [blocks].
        reach: float32, lengths of columns at most: of tokens, of blocks.
        length: float32 [n, 1], of a row.
        lost: float32 [n, 1], length of what rounding took from it.
        named: bool [size * blocks], tokens that may be chosen; None where all may.
        count: how many at each pole; see `selects`.
        rounding: error of a score for each unit of its size.
        underflow: and beside it.

    Returns:
        Ids int64 and upper bounds float32 [2, n, count], descending, and the greatest upper bound left out [2, n, 1].
    """
    n, blocks = extremes.shape[1:]
    tokens = torch.empty(n, 2, count, dtype=torch.int64, device=scores.device)
    uppers = torch.empty(n, 2, count, dtype=torch.float32, device=scores.device)
    outside = torch.empty(n, 2, 1, dtype=torch.float32, device=scores.device)
    with torch.cuda.device_of(scores):
        _select[(n, 2)](
            scores, scores.stride(0), extremes, fixed[0], fixed[1], reach[0], reach[1], length, lost,
            scores if named is None else named.view(torch.uint8), tokens, uppers, outside,
            d_vocab, blocks, count, rounding, underflow,
            SIZE=scores.shape[1] // blocks, BLOCKS=triton.next_power_of_2(blocks), COUNT=triton.next_power_of_2(count),
            NAMED=named is not None, num_warps=2,
        )  # fmt: skip
    return tokens.transpose(0, 1), uppers.transpose(0, 1), outside.transpose(0, 1)


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
    with torch.cuda.device_of(W_U):
        _exact[(n, triton.cdiv(m, _TOKENS))](
            rows.contiguous(), W_U, W_U.stride(0), W_U.stride(1), ids.contiguous(), out, m, rows.shape[1],
            TOKENS=_TOKENS, WIDTH=_WIDTH,
        )  # fmt: skip
    return out
