"""Tokens whose columns of W_U are next to the same, as those are that training never saw.

Their scores are rounded alike, so that errors do not cancel over them; but their mean score is known exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts, plain_arithmetic
from tl_flash.kernel.screens import PART_BYTES

if TYPE_CHECKING:
    from tl_flash.kernel.unembedding import Unembedding

_RUN = 128  # tokens in a row of ids, as unused ones are
_ALIKE = 0.01  # of the squares of a run's columns, less the mean of all, what their own mean leaves


class Alike(NamedTuple):
    """Runs of tokens with next to the same column."""

    ids: Tensor
    #   int64 [run, token]
    means: Tensor
    #   float64 [d_model, run], of each run's (scaled) columns

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.ids.nbytes + self.means.nbytes

    @classmethod
    def of(cls, u: Unembedding) -> Alike | None:
        """Look through W_U once; None where there are none."""
        starts, means = [], []
        scale = u.column_scale
        with torch.no_grad(), plain_arithmetic(u.device):
            for part in parts(u.d_vocab // _RUN, max(PART_BYTES // (4 * u.d_model * _RUN), 1)):
                tokens = slice(part.start * _RUN, part.stop * _RUN)
                W = u.W_U[:, tokens].double()
                W = (W if scale is None else W * scale[tokens]).unflatten(1, (-1, _RUN))
                own = W.mean(2)
                left = (W - own[..., None]).square_().sum((0, 2))
                whole = (W - u.mean_column[:, None, None]).square_().sum((0, 2))
                found = (left < _ALIKE * whole).nonzero()[:, 0]
                starts.append(tokens.start + found * _RUN)
                means.append(own[:, found])
        start = torch.cat(starts) if starts else torch.empty(0, dtype=torch.int64)
        if not len(start):
            return None
        return cls(start[:, None] + torch.arange(_RUN, device=u.device), torch.cat(means, dim=1))
