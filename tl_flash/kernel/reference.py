"""The plain definition of the decode: every score at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tl_flash.kernel.checks import expect_one_of
from tl_flash.kernel.readout import Readout, sort_tokens


def reference_decode(
    x: Tensor,
    W_U: Tensor,
    *,
    gain: Tensor | None = None,
    centre: bool = False,
    score: str = "dot",
    ignore: Sequence[int] | Tensor | None = None,
    k: int = 10,
    tracked: Sequence[int] | Tensor | None = None,
    norm: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Readout:
    """The plain definition of `decode`: every score at once, in `dtype`. For tests and benchmarks.

    s = W_U'^T x_c, less its mean over the vocabulary; W_U' = diag(gain) W_U, x_c = x less its mean if `centre`.
    log_z = logsumexp(+-tau * s), tau = sqrt(d_model) / ||x_c||. Under "cosine" x_c and the columns of W_U' (less
    their means if `centre`) have unit length, and nothing is taken off over the vocabulary.
    """
    expect_one_of("score", score, ("dot", "cosine"))
    x, W = x.to(dtype), W_U.to(dtype)
    if gain is not None:
        W = gain.to(dtype)[:, None] * W
    if centre:
        x, W = x - x.mean(-1, keepdim=True), W - W.mean(0)
    length = torch.linalg.vector_norm(x, dim=-1)
    zero = torch.linalg.vector_norm(x if gain is None else x * gain.to(dtype), dim=-1) == 0
    if score == "cosine":
        x, W = (
            x / length.masked_fill(zero, 1)[:, None],
            W / torch.linalg.vector_norm(W, dim=0).clamp(min=torch.finfo(dtype).tiny),
        )
    scores = torch.einsum("nd,dv->nv", x, W)
    mean = scores.mean(-1)
    centred = scores - mean[:, None]
    variance = centred.square().mean(-1)
    norm = length if norm is None else norm.to(dtype)
    zero, norm = zero | (norm == 0), norm.masked_fill(zero, 0)
    log_z = torch.full((2, len(x)), math.nan, dtype=dtype, device=x.device)
    if score == "dot":
        scores = centred
        scaled = scores * (math.sqrt(x.shape[1]) / norm)[:, None]
        log_z = torch.stack([scaled.logsumexp(-1), (-scaled).logsumexp(-1)])
    never, followed = (torch.as_tensor([] if ids is None else ids).long() for ids in (ignore, tracked))
    poles = [_top_tokens(sign * scores, never, k) for sign in (1, -1)]
    numbers = {
        "logits": torch.stack([logits for logits, _ in poles]),
        "log_z": log_z,
        "norm": norm,
        "mean": mean,
        "std": variance.sqrt(),
        "kurtosis": centred.square().square().mean(-1) / variance.square() - 3,
        "tracked": scores[:, followed],
    }
    ids = torch.stack([ids for _, ids in poles]).masked_fill(zero[:, None], -1).int().cpu()
    for name in numbers.keys() - {"norm"}:
        of_row = numbers[name].transpose(0, 1) if name in ("logits", "log_z") else numbers[name]
        of_row[zero] = math.nan
    return Readout(ids=ids, repaired=0, **{name: tensor.float().cpu() for name, tensor in numbers.items()})


def _top_tokens(scores: Tensor, never: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` with ties to the lower id: logits and ids [n, k]. Writes over `scores`."""
    scores[:, never] = -math.inf
    top = scores.topk(k)
    tied = (scores >= top.values[:, -1:]).sum(-1) > k  # topk leaves open which of these it takes
    logits, ids = sort_tokens(top.values, top.indices, k)
    for row in tied.nonzero()[:, 0].tolist():
        again = scores[row].sort(descending=True, stable=True)
        logits[row], ids[row] = again.values[:k], again.indices[:k]
    return logits, ids
