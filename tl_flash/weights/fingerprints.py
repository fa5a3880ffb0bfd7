"""Digests of weights: what tells one model's from another's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(*matrices: Tensor) -> str:
    """A digest of the values of matrices, the same for every memory layout and device.

    Every element counts, with its place: a matrix enters by its shape, its dtype and the exact integer sums of its bit
    patterns along both axes, those of the columns weighted by row. (It tells models apart; it is no signature.)

    Raises:
        ValueError: one is no matrix, or holds no numbers.
    """
    return combined([digest(matrix) for matrix in matrices])


def combined(digests: Sequence[str]) -> str:
    """The fingerprint of matrices by their digests, which may have been taken apart from each other."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32]


def digest(matrix: Tensor) -> str:
    """The digest of one matrix; see `fingerprint`."""
    return Sums.of(matrix).digest()


@dataclass(frozen=True)
class Sums:
    """What a digest is made of, still on the matrix's device: nothing has waited for it."""

    kind: str
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Sums:
        """Sum the bit patterns of a matrix along both axes.

        Raises:
            ValueError: no matrix, or one without numbers.
        """
        if matrix.ndim != 2 or matrix.numel() == 0:
            raise ValueError(
                f"fingerprint: expected a matrix of at least one row and column, got shape {list(matrix.shape)}"
            )
        bits = matrix.detach().view(_BITS[matrix.element_size()])
        rows = []
        columns = torch.zeros(matrix.shape[1], dtype=torch.int64, device=matrix.device)
        block_size = 2**20 if matrix.device.type == "cpu" else 2**25  # int64 sums of a whole W_U would be large
        size = max(1, block_size // matrix.shape[1])
        for start in range(0, len(bits), size):
            block = bits[start : start + size].to(torch.int64, copy=True)  # of float64 weights it would be a view
            rows.append(block.sum(1))
            weight = torch.arange(start + 1, start + 1 + len(block), device=matrix.device)
            columns += block.mul_(weight[:, None]).sum(0)
        return cls(f"{tuple(matrix.shape)} {matrix.dtype}", torch.cat(rows), columns)

    def digest(self) -> str:
        """The digest, for which the device is waited for."""
        hashed = hashlib.sha256(self.kind.encode())
        for sums in (self.rows, self.columns):
            hashed.update(sums.cpu().numpy().tobytes())
        return hashed.hexdigest()[:32]
