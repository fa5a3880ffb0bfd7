"""A few columns of W_U': z-scores of chosen tokens in any number of directions, by one thin product.

The z-score of token t in direction x is x . c_t / sqrt(x' C x), with c_t the column of W_U' less the mean of all
columns, and C the covariance of the columns over the vocabulary: no other token's score is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import pieces, plain_arithmetic
from tl_flash.kernel.checks import expect_matrix, token_ids
from tl_flash.kernel.unembedding import Unembedding


@dataclass(frozen=True, eq=False)
class Columns:
    """Some tokens' columns, ready to score directions; all of it on the device of W_U."""

    columns: Tensor
    #   float32 [d_model, m], of W_U', less the mean over the vocabulary, in the length of a typical column of W_U
    covariance: Tensor
    #   float32 [d_model, d_model], of all columns of W_U' over the vocabulary, in the same unit

    @classmethod
    def of(cls, unembedding: Unembedding, ids: Tensor) -> Columns:
        """Take the columns of some tokens, ids [m].

        Raises:
            TypeError: ids are not whole numbers.
            ValueError: an id is out of range.
        """
        wanted = token_ids("ids", ids, unembedding.d_vocab).to(unembedding.device)
        covariance = _folded(unembedding, _folded(unembedding, unembedding.covariance.double()).T)
        return cls(centred_columns(unembedding, wanted) / unembedding.measures.size, covariance.float())

    def z(self, x: Tensor) -> Tensor:
        """Z-scores of each token in each direction, float32 [n, m] on W_U's device; NaN in a zero direction.

        Raises:
            TypeError: x is not a float tensor.
            ValueError: a shape.
        """
        expect_matrix("x", x, f"[n, {len(self.columns)}]", width=len(self.columns))
        with torch.no_grad(), plain_arithmetic(self.columns.device):
            x = x.detach().to(self.columns.device, torch.float32)
            unit = x / x.norm(dim=1, keepdim=True)
            std = torch.linalg.vecdot(unit @ self.covariance, unit).clamp_(min=0).sqrt_()
            return unit.div_(std[:, None]) @ self.columns


def centred_columns(unembedding: Unembedding, ids: Tensor | slice) -> Tensor:
    """Columns of W_U' less their mean over the vocabulary, float32 [d_model, m]."""
    u = unembedding
    return _folded(u, u.W_U[:, ids].double() - u.mean_column[:, None]).float()


def column_lengths(unembedding: Unembedding) -> Tensor:
    """Length of each column of W_U' less their mean over the vocabulary, float32 [d_vocab]; found once."""
    u = unembedding

    def find() -> Tensor:
        with torch.no_grad():
            return torch.cat([centred_columns(u, part).norm(dim=0) for part in _vocabulary(u)])

    return u.kept.once(("lengths", None if u.gain is None else u.gain.cpu().numpy().tobytes(), u.centre), find)


def column_cosines(unembedding: Unembedding, columns: Tensor) -> Tensor:
    """Cosine of each of some columns [d_model, m] with every token's, float32 [m, d_vocab]; 0 with a zero column."""
    u = unembedding
    with torch.no_grad(), plain_arithmetic(u.device):
        wanted = torch.nn.functional.normalize(columns.to(u.device), dim=0).T
        return torch.cat(
            [wanted @ torch.nn.functional.normalize(centred_columns(u, part), dim=0) for part in _vocabulary(u)], dim=1
        )


def _vocabulary(u: Unembedding) -> list[slice]:
    return list(pieces(u.d_vocab, 8 * u.d_model, u.device))


def _folded(u: Unembedding, columns: Tensor) -> Tensor:
    """Columns of W_U as columns of W_U': times the gain, and centred over d_model where the norm does."""
    if u.gain is not None:
        columns = columns * u.gain[:, None]
    return columns - columns.mean(0) if u.centre else columns
