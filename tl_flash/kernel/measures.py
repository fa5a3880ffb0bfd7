"""What the engine has to know of a whole W_U, found in one pass over it: mean and lengths of its columns.

The pass is made piece by piece, each small enough to stay in the processor's cache, so that a few directions may be
scored on it as well: to read W_U from memory is what takes the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import FLOAT32_ROUNDOFF, parts, pieces, upper_float32

_ROWS, _RUN = 4, 512  # coordinates in a piece where columns are not contiguous, and tokens that are summed in float32
_SOME = 256  # columns that tell how long columns are
_ORDINARY = 1e-12, 1e12  # lengths of columns whose squares float32 holds
FUSED_BY_TOKEN, FUSED_BY_COORDINATE = 64, 4  # directions that are worth scoring in the same pass


@dataclass(frozen=True, eq=False)
class Measures:
    """Mean and lengths of the columns of a W_U."""

    column_scale: Tensor | None
    #   float64 [d_vocab], 1 / length of each column of W_U' under "cosine" (0 for a zero column)
    mean_column: Tensor
    #   float64 [d_model], the mean over the vocabulary of the (scaled) columns of W_U
    reach: Tensor
    #   float32 [d_vocab], an upper bound on the length of each (scaled) column
    size: float
    #   root mean square length of the (scaled) columns; 1 where all are zero

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(each.nbytes for each in (self.column_scale, self.mean_column, self.reach) if each is not None)


def measure(W_U: Tensor, rows: Tensor | None = None, scores: Tensor | None = None) -> Measures:
    """Measure W_U [d_model, d_vocab], whose scores are dot products.

    Args:
        W_U: the unembedding.
        rows: float32 [n, d_model], directions to score meanwhile, as many as `fuses` allows.
        scores: float32 [n, d_vocab], where their scores are written.

    Raises:
        ValueError: weights that are not finite, or columns whose lengths float32 does not hold.
    """
    ordinary = _ORDINARY[0] < typical_length(W_U) < _ORDINARY[1] and W_U.dtype != torch.float64
    passing = _by_token if W_U.stride(0) == 1 else _by_coordinate
    total = lengths = None
    if ordinary:
        total, lengths = passing(W_U, torch.float32, rows, scores)
    if total is None or lengths is None or not torch.isfinite(lengths).all():  # not ordinary, or not finite
        total, lengths = passing(W_U, torch.float64, None, None)
        if rows is not None and scores is not None:
            torch.mm(rows, W_U.float(), out=scores)
    return Measures(None, total / W_U.shape[1], upper_float32(lengths), checked_size(total, lengths))


def typical_length(W_U: Tensor) -> float:
    """Root mean square length of some columns."""
    some = W_U[:, :: max(1, W_U.shape[1] // _SOME)].double()
    return some.square().sum(0).mean().sqrt().item()


def fuses(W_U: Tensor, n: int) -> bool:
    """Whether so many directions are scored while W_U is measured; it is on a CPU that memory is the narrow place."""
    most = FUSED_BY_TOKEN if W_U.stride(0) == 1 else FUSED_BY_COORDINATE
    return W_U.device.type == "cpu" and W_U.dtype != torch.float64 and n <= most


def measure_cosine(W_U: Tensor, gain: Tensor | None, centre: bool) -> Measures:
    """Measure W_U whose scores are cosines: of its columns divided by their lengths in W_U'."""
    d_model, d_vocab = W_U.shape
    scale, reach = torch.empty(2, d_vocab, dtype=torch.float64, device=W_U.device)
    total = torch.zeros(d_model, dtype=torch.float64, device=W_U.device)
    for part in pieces(d_vocab, 8 * d_model, W_U.device):
        W = W_U[:, part].double()
        seen = W if gain is None else W * gain[:, None]
        if centre:
            seen = seen - seen.mean(0)
        scale[part] = torch.linalg.vector_norm(seen, dim=0).reciprocal()
        scale[part] = scale[part].nan_to_num(posinf=0.0)  # a zero column has no direction: its cosines are 0
        reach[part] = torch.linalg.vector_norm(W, dim=0) * scale[part]
        total += W @ scale[part]
    return Measures(scale, total / d_vocab, upper_float32(reach), checked_size(total, reach))


def checked_size(total: Tensor, lengths: Tensor) -> float:
    """Root mean square of columns' lengths; 1 where all are zero.

    Raises:
        ValueError: a sum of columns that is not finite, or extreme lengths.
    """
    if not torch.isfinite(total).all():
        raise ValueError("W_U: expected finite weights, got NaN or infinity; look for a broken checkpoint")
    size = lengths.double().square().mean().sqrt().item()
    if size and not 1e-30 < size < 1e30:
        raise ValueError(f"W_U: expected columns of lengths between 1e-30 and 1e30, got {size:.0e}; rescale W_U")
    return size or 1.0


def _by_token(W_U: Tensor, dtype: torch.dtype, rows: Tensor | None, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of all columns, float64 [d_model], and upper bounds on their lengths, float64 [d_vocab].

    Where rows are scored meanwhile, parts of the sum are made in float32, which takes half the time.
    """
    d_model, d_vocab = W_U.shape
    total = torch.zeros(d_model, dtype=torch.float64, device=W_U.device)
    lengths = torch.empty(d_vocab, dtype=dtype, device=W_U.device)
    for part in pieces(d_vocab, 8 * d_model, W_U.device):
        columns = W_U[:, part].T.to(dtype)
        torch.linalg.vector_norm(columns, dim=1, out=lengths[part])
        if rows is None or scores is None:
            total += columns.sum(0, dtype=torch.float64)
        else:
            total += columns.sum(0)
            torch.mm(rows, columns.T, out=scores[:, part])
    return total, _at_most(lengths, d_model)


def _by_coordinate(
    W_U: Tensor, dtype: torch.dtype, rows: Tensor | None, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `_by_token` returns, reading W_U row by row."""
    d_model, d_vocab = W_U.shape
    total = torch.empty(d_model, dtype=torch.float64, device=W_U.device)
    squares = torch.zeros(d_vocab, dtype=dtype, device=W_U.device)
    whole = d_vocab // _RUN * _RUN
    if scores is not None:
        scores.zero_()
    on_cpu = W_U.device.type == "cpu"
    for part in parts(d_model, _ROWS) if on_cpu else pieces(d_model, 8 * d_vocab, W_U.device):
        some = W_U[part].to(dtype)
        if on_cpu:
            for row in some:
                squares.addcmul_(row, row)
        else:
            squares += some.square().sum(0)
        if rows is None or scores is None:
            total[part] = some.sum(1, dtype=torch.float64)
        else:
            runs = some[:, :whole].unflatten(1, (-1, _RUN)).sum(2)
            total[part] = runs.sum(1, dtype=torch.float64) + some[:, whole:].sum(1)
            scores.addmm_(rows[:, part], some)
    return total, _at_most(squares.sqrt_(), d_model)


def _at_most(lengths: Tensor, d_model: int) -> Tensor:
    """Bounds on lengths that were computed in any order of summing: float64.

    The roundings are those of d_model squares and sums and of the root; squares below float32's least are lost.
    """
    if lengths.dtype == torch.float64:
        return lengths * (1 + 1e-12)
    return lengths.double() * (1 + (d_model + 4) * FLOAT32_ROUNDOFF) + 1e-19 * d_model**0.5
