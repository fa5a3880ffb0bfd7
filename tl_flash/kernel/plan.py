"""How large a tile of scores is within a byte budget, and how its tokens are cut into blocks and groups of blocks.

Of b blocks token t is in block t mod b, of g groups block b is in group b mod g: so extremes are taken along contiguous
memory.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_flash.kernel.reduce import has_triton
from tl_flash.kernel.rescore import pair_bytes, pairs_within
from tl_flash.kernel.screens import Screen
from tl_flash.kernel.unembedding import Unembedding

WORK = {"cpu": 400 * 2**10, "cuda": 2**24}  # scores that are reduced at a time
TILE_BYTES = {"cpu": 100 * 2**20, "cuda": 2**30}  # of a tile's scores: larger tiles are no faster
MOST_ROWS = {"cpu": 512, "cuda": 4096}
FAN = 8  # blocks in a group
LEAST_CANDIDATES = 32  # on a GPU, where the statistics take all of them exact
FEW_ROWS = 256  # fewer make a product of matrices slow


@dataclass(frozen=True)
class Plan:
    """Sizes of a tile within a byte budget."""

    rows: int
    #   directions in a tile
    columns: int
    #   tokens that one product takes
    blocks: int
    #   their extremes stand for their tokens until the best blocks are known; a multiple of FAN
    size: int
    #   tokens in a block
    candidates: int
    #   tokens that may be scored again at each pole, and blocks and groups looked into
    pairs: int
    #   scores made again at a time
    by_token: bool
    #   the budget holds a copy of W_U by token, see `Unembedding.by_token`
    buffers: tuple[int, int, int, int, int]
    #   bytes of a tile's scores, of their block extremes, of scores widened to float32, of work on these, and of some
    #   columns of W_U converted

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all five."""
        return sum(self.buffers)

    @classmethod
    def within(cls, max_bytes: int, u: Unembedding, screen: Screen, k: int) -> Plan:
        """Share `max_bytes` out.

        Raises:
            ValueError: it does not suffice for one direction.
        """
        plan = cls._sharing(max_bytes, u, screen, k, by_token=False)
        if u.W_U.stride(0) != 1 and max_bytes > u.W_U.nbytes:
            with_copy = cls._sharing(max_bytes - u.W_U.nbytes, u, screen, k, by_token=True)
            if with_copy.rows >= min(FEW_ROWS, plan.rows):
                plan = with_copy
        if plan.rows < 1:

            def suffices(budget: int) -> bool:
                return cls._sharing(budget, u, screen, k, by_token=False).rows >= 1

            least = bisect_left(range(2**50), True, key=suffices)
            raise ValueError(
                f"max_bytes: expected at least {least} for one direction of {u.d_model} against {u.d_vocab} tokens, "
                f"got {max_bytes}; raise it or leave it out"
            )
        return plan

    @classmethod
    def _sharing(cls, max_bytes: int, u: Unembedding, screen: Screen, k: int, *, by_token: bool) -> Plan:
        kind, triton, itemsize = u.device.type, has_triton(u.device), screen.dtype.itemsize
        candidates, size, multiple = _candidates_needed(u, screen, k), 16, FAN
        if triton:
            candidates, size, multiple = max(candidates, LEAST_CANDIDATES), 64, 2 * FAN  # so that loads are wide
        blocks = -(-u.d_vocab // (size * multiple)) * multiple
        pairs = pairs_within(u, max_bytes // 16)
        a_column = itemsize * u.d_model * (screen.weights.dtype != screen.dtype)
        columns = max(min(max_bytes // 8 // a_column, u.d_vocab), 16) if a_column else u.d_vocab
        work = 0 if triton else max(min(WORK[kind], max_bytes // 64), size * blocks)
        # Bytes of a row's scores, of its block extremes, of itself, and of choosing its candidates.
        a_row, its_blocks, itself = itemsize * size * blocks, 2 * itemsize * blocks, 32 * u.d_model
        choosing = 2 * 24 * blocks // FAN + 2 * 32 * candidates * (FAN + size)
        if triton:  # extremes are no part of the buffers there
            of_candidates = 2 * 64 * candidates if _selected_in_registers(blocks, candidates) else choosing
            its_blocks, choosing = 0, 2 * 4 * blocks + of_candidates
        wide = work if itemsize < 4 else 0  # scores are widened into
        rest = max_bytes - (work + wide) * 4 - pairs * pair_bytes(u) - columns * a_column - 12 * u.d_vocab
        most = min(MOST_ROWS[kind], max(TILE_BYTES[kind] // a_row, FEW_ROWS))
        rows = int(max(min(rest // (a_row + its_blocks + itself + choosing), most), 0))
        a, b, c, d, e = map(_round_up, (rows * a_row, rows * its_blocks, 4 * wide, 4 * work, columns * a_column))
        return cls(rows, columns, blocks, size, candidates, pairs, by_token, (a, b, c, d, e))

    def greatest(self, of_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The greatest in each block and in each group of float32 values [d_vocab], none negative."""
        padded = torch.nn.functional.pad(of_tokens, (0, self.size * self.blocks - len(of_tokens)))
        of_blocks = padded.view(self.size, -1).amax(0)
        return of_blocks, of_blocks.view(FAN, -1).amax(0)


def _selected_in_registers(blocks: int, candidates: int) -> bool:
    from tl_flash.kernel import triton_kernels

    return triton_kernels.selects(blocks, candidates)


def _round_up(size: int) -> int:
    return -(-size // 64) * 64  # where vector units like buffers to start


def _candidates_needed(u: Unembedding, screen: Screen, k: int) -> int:
    """How many tokens cannot be told from the top k, in all but few rows, were scores normally distributed.

    In units of the scores' standard deviation the k-th is near sqrt(2 log(d_vocab / k)), where their density falls by
    a factor of e over the inverse of that, and the bounds on errors are about sqrt(d_model) times the relative ones.
    """
    kth = math.sqrt(2 * math.log(u.d_vocab / k))
    of_rows = 0.42 * screen.rounding  # root mean square of what rounding takes from a number, beside it
    of_weights = 0.0 if screen.dtype == torch.float32 else screen.share_lost
    error = math.sqrt(u.d_model) * (of_rows + of_weights + screen.accumulation) + screen.rounding * kth
    mixed_in = k * math.expm1(min(kth * error, 4))
    return math.ceil(k + mixed_in + 3 * math.sqrt(mixed_in) + 4)
