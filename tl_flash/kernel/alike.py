"""Tokens whose columns of W_U are next to the same, as those are that training never saw.

Their scores are rounded alike, so that errors do not cancel over them; but their mean score is known exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import pieces, plain_arithmetic

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
        runs, wide = [], torch.float64 if u.W_U.dtype == torch.float64 else torch.float32
        mean, scale = (u.mean_column / u.measures.size).to(wide)[:, None, None], u.column_scale
        with torch.no_grad(), plain_arithmetic(u.device):
            for part in pieces(u.d_vocab // _RUN, 4 * u.d_model * _RUN, u.device):
                tokens = slice(part.start * _RUN, part.stop * _RUN)
                W = u.W_U[:, tokens].to(wide) / u.measures.size
                if scale is not None:
                    W *= scale[tokens].to(wide)
                W = W.unflatten(1, (-1, _RUN)) - mean
                own = W.mean(2, keepdim=True)
                left = (W - own).square_().sum((0, 2))
                runs.append(part.start + (left < _ALIKE * W.square_().sum((0, 2))).nonzero()[:, 0])
            if not sum(map(len, runs)):
                return None
            ids = torch.cat(runs)[:, None] * _RUN + torch.arange(_RUN, device=u.device)
            means = [(u.W_U[:, run].double() * (1.0 if scale is None else scale[run])).mean(1) for run in ids]
            return cls(ids, torch.stack(means, dim=1))
