"""What is made of an unembedding once, for all layers: `Unembedding` and `prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts, plain_arithmetic
from tl_flash.kernel.checks import expect_float, expect_matrix, expect_one_of, token_ids
from tl_flash.kernel.screens import PART_BYTES, Screen, bf16_screen, plain_screen, screens_in_bf16, upper_float32


@dataclass(frozen=True, eq=False)
class Unembedding:
    """W_U prepared once for all layers; made by `prepare`. It holds W_U itself, and at most one bf16 copy.

    Once many directions were decoded it may also hold what `by_token` tells of, within the caller's `max_bytes`.
    """

    W_U: Tensor
    #   [d_model, d_vocab], as given
    gain: Tensor | None
    #   float64 [d_model], the scale of the final norm
    centre: bool
    score: str
    precision: str
    ignored: Tensor
    #   int64, ids that are never reported
    reportable: Tensor
    #   bool [d_vocab]
    column_scale: Tensor | None
    #   float64 [d_vocab], 1 / length of each column of W_U' under "cosine" (0 for a zero column)
    mean_column: Tensor
    #   float64 [d_model], the mean over the vocabulary of the (scaled) columns of W_U
    size: float
    #   root mean square length of the (scaled) columns: the unit in which scores are screened
    plain: Screen
    #   W_U itself, screened in float32
    fast: Screen
    #   what screens fastest on this device: plain, or one in bf16
    _covariance: list[Tensor] = field(default_factory=list, repr=False)
    _by_token: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def d_model(self) -> int:
        """Width of a direction."""
        return self.W_U.shape[0]

    @property
    def d_vocab(self) -> int:
        """Number of tokens, reportable or not."""
        return self.W_U.shape[1]

    @property
    def device(self) -> torch.device:
        """Where scores are computed."""
        return self.W_U.device

    @property
    def covariance(self) -> Tensor:
        """float32 [d_model, d_model], the covariance of W_U's (scaled) columns over the vocabulary; made once."""
        if not self._covariance:
            self._covariance.append(_covariance(self))
        return self._covariance[0]

    @property
    def by_token(self) -> Tensor | None:
        """W_U transposed, [d_vocab, d_model], each token's column in one piece of memory: many times faster to gather.

        None where W_U is not held so, unless `hold_by_token` made a copy.
        """
        if self.W_U.stride(0) == 1:
            return self.W_U.T
        return self._by_token[0] if self._by_token else None

    def hold_by_token(self) -> None:
        """Copy W_U unless `by_token` is there."""
        if self.by_token is None:
            self._by_token.append(self.W_U.T.contiguous())


def prepare(
    W_U: Tensor,
    *,
    gain: Tensor | None = None,
    centre: bool = False,
    score: str = "dot",
    ignore: Sequence[int] | Tensor | None = None,
    device: torch.device | str | None = None,
    precision: str = "exact",
) -> Unembedding:
    """Prepare an unembedding for `decode`, once for all layers.

    Where the device multiplies bf16 faster than float32, directions are screened in bf16: against W_U itself if that
    is what it is held in, else against a bf16 copy. Elsewhere there is no copy.

    Args:
        W_U: [d_model, d_vocab], any float dtype, any strides; used as it is held.
        gain: [d_model], the scale of the final norm; None where it is folded already.
        centre: the final norm is a LayerNorm: directions lose their mean.
        score: "dot" (logits) or "cosine" (of x and the columns of W_U' = diag(gain) W_U).
        ignore: ids that are never reported. Statistics still run over the whole vocabulary.
        device: where to compute; W_U is moved there. By default where it is.
        precision: "exact" proves the tokens of every row, "fast" leaves out the proof.

    Raises:
        TypeError: W_U or gain is not a float tensor, or ignore holds something other than ids.
        ValueError: a shape, a non-finite weight, an unknown score or precision, an id out of range.

    Example:
        >>> import torch
        >>> from tl_flash.kernel import decode, prepare
        >>> decode(torch.tensor([[0.1, 3.0, -0.2]]), prepare(torch.eye(3)), k=2).ids.tolist()
        [[[1, 0]], [[2, 0]]]
    """
    expect_matrix("W_U", W_U, "[d_model, d_vocab]")
    if 0 in W_U.shape:
        raise ValueError(f"W_U: expected at least one token and one dimension, got shape {list(W_U.shape)}")
    expect_one_of("score", score, ("dot", "cosine"))
    expect_one_of("precision", precision, ("exact", "fast"))
    W_U = W_U.detach().to(device=device)
    if W_U.device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a CPU or a CUDA device (float64 is needed), got {W_U.device}; pass 'cpu'")
    if gain is not None:
        gain = _checked_gain(gain, W_U)
    ignored = token_ids("ignore", ignore, W_U.shape[1]).unique().to(W_U.device)
    reportable = torch.ones(W_U.shape[1], dtype=torch.bool, device=W_U.device)
    reportable[ignored] = False
    with torch.no_grad(), plain_arithmetic(W_U.device):
        column_scale, mean_column, reach = _measure(W_U, gain, centre, score)
        size = _checked_size(mean_column, reach)
        plain = fast = plain_screen(W_U, reach)
        if screens_in_bf16(W_U):
            fast = bf16_screen(W_U, column_scale, mean_column, reach)
    return Unembedding(
        W_U=W_U,
        gain=gain,
        centre=centre,
        score=score,
        precision=precision,
        ignored=ignored,
        reportable=reportable,
        column_scale=column_scale,
        mean_column=mean_column,
        size=size,
        plain=plain,
        fast=fast,
    )


def _checked_gain(gain: Tensor, W_U: Tensor) -> Tensor:
    expect_float("gain", gain)
    if gain.shape != W_U.shape[:1]:
        raise ValueError(f"gain: expected shape [{len(W_U)}], a scale for each row of W_U, got {list(gain.shape)}")
    gain = gain.detach().to(W_U.device, torch.float64)
    if not torch.isfinite(gain).all():
        raise ValueError("gain: expected finite scales, got NaN or infinity; look for a broken checkpoint")
    if not gain.any():
        raise ValueError("gain: expected a scale that is not zero throughout, got zeros; look for a broken checkpoint")
    return gain


def _measure(W_U: Tensor, gain: Tensor | None, centre: bool, score: str) -> tuple[Tensor | None, Tensor, Tensor]:
    """Scale of each column under "cosine", mean of the scaled columns, bound on their lengths."""
    d_model, d_vocab = W_U.shape
    scale = torch.empty(d_vocab, dtype=torch.float64, device=W_U.device)
    reach = torch.empty_like(scale)
    total = torch.zeros(d_model, dtype=torch.float64, device=W_U.device)
    for part in parts(d_vocab, PART_BYTES // (8 * d_model)):
        W = W_U[:, part].double()
        reach[part] = torch.linalg.vector_norm(W, dim=0)
        if score == "dot":
            total += W.sum(1)
            continue
        seen = W if gain is None else W * gain[:, None]
        if centre:
            seen = seen - seen.mean(0)
        scale[part] = torch.linalg.vector_norm(seen, dim=0).reciprocal()
        scale[part] = scale[part].nan_to_num(posinf=0.0)  # a zero column has no direction: its cosines are 0
        reach[part] *= scale[part]
        total += W @ scale[part]
    return (None if score == "dot" else scale), total / d_vocab, upper_float32(reach)


def _checked_size(mean_column: Tensor, reach: Tensor) -> float:
    """Root mean square length of the columns; 1 where all are zero."""
    if not torch.isfinite(mean_column).all():
        raise ValueError("W_U: expected finite weights, got NaN or infinity; look for a broken checkpoint")
    size = reach.double().square().mean().sqrt().item()
    if size and not 1e-30 < size < 1e30:
        raise ValueError(f"W_U: expected columns of lengths between 1e-30 and 1e30, got {size:.0e}; rescale W_U")
    return size or 1.0


def _covariance(u: Unembedding) -> Tensor:
    """float32 products of parts of the vocabulary, summed in float64."""
    total = torch.zeros(u.d_model, u.d_model, dtype=torch.float64, device=u.device)
    columns = max(PART_BYTES // (8 * u.d_model), u.d_model // 4)  # few, and each of them smaller than the total
    with torch.no_grad(), plain_arithmetic(u.device):
        for part in parts(u.d_vocab, columns):
            W = u.W_U[:, part].to(torch.float64, copy=True)
            if u.column_scale is not None:
                W *= u.column_scale[part]
            W = (W - u.mean_column[:, None]).float()
            total += W @ W.T
    return (total / u.d_vocab).float()
