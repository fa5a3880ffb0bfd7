"""What is made of an unembedding once, for all layers: `Unembedding` and `prepare`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tl_flash.kernel.checks import expect_float, expect_matrix, expect_one_of, token_ids

FLOAT32_ROUNDOFF, BF16_ROUNDOFF = 2.0**-24, 2.0**-8  # significands of 24 and 8 bits
LEAST_D_MODEL, LEAST_D_VOCAB = 256, 4096  # of what is screened in bf16
PART_BYTES = 4 * 2**20  # of float64, while W_U is measured


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


@dataclass(frozen=True, eq=False)
class Screen:
    """The matrix that directions are multiplied with to find candidates, and how far it is from the truth."""

    weights: Tensor
    #   [d_model, d_vocab]; multiplied in `dtype`
    dtype: torch.dtype
    #   float32 or bfloat16
    scaled: bool
    #   weights hold column_scale already, and less their mean over the vocabulary
    reach: Tensor
    #   float32 [d_vocab], an upper bound on the length of each column of weights (times column_scale)
    residual: Tensor
    #   float32 [d_vocab], an upper bound on the length of what each column lost to rounding
    accumulation: float
    #   |computed - x . w| <= accumulation ||x|| ||w|| for the product, before its result is rounded to dtype
    rounding: float
    #   |rounded - computed| <= rounding |computed|


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
        plain = fast = _plain_screen(W_U, reach)
        if screens_in_bf16(W_U):
            fast = _bf16_screen(W_U, column_scale, mean_column, reach)
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


def screens_in_bf16(W_U: Tensor) -> bool:
    """Whether scores are screened in bf16: not where the product is too small for the time that it saves to show."""
    return len(W_U) >= LEAST_D_MODEL and W_U.shape[1] >= LEAST_D_VOCAB and multiplies_bf16_faster(W_U.device)


@cache
def multiplies_bf16_faster(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices so much faster than float32 ones that it pays.

    A GPU's or an x86 processor's instructions tell. Where torch does not tell of them, it is tried once.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if told.get("architecture") == "x86_64":
        return bool(told.get("avx512_bf16") or told.get("amx_bf16"))
    return _tries_bf16_faster()


def _tries_bf16_faster() -> bool:
    def seconds(dtype: torch.dtype, n: int, repeats: int) -> float:
        a, b = torch.ones(n, 512, dtype=dtype), torch.ones(512, 4 * n, dtype=dtype)
        took = []
        for _ in range(repeats + 1):  # the first one warms up
            start = time.perf_counter()
            torch.mm(a, b)
            took.append(time.perf_counter() - start)
        return min(took[1:])

    with plain_arithmetic(torch.device("cpu")):
        for n, repeats, pays in ((16, 1, 10.0), (256, 5, 0.7)):  # emulated bf16 takes seconds in a large product
            if seconds(torch.bfloat16, n, repeats) > pays * seconds(torch.float32, n, repeats):
                return False
    return True


def _checked_gain(gain: Tensor, W_U: Tensor) -> Tensor:
    expect_float("gain", gain)
    if gain.shape != W_U.shape[:1]:
        raise ValueError(f"gain: expected shape [{len(W_U)}], a scale for each row of W_U, got {list(gain.shape)}")
    gain = gain.detach().to(W_U.device, torch.float64)
    if not torch.isfinite(gain).all():
        raise ValueError("gain: expected finite scales, got NaN or infinity; look for a broken checkpoint")
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
    return (None if score == "dot" else scale), total / d_vocab, _upper_float32(reach)


def _checked_size(mean_column: Tensor, reach: Tensor) -> float:
    """Root mean square length of the columns; 1 where all are zero."""
    if not torch.isfinite(mean_column).all():
        raise ValueError("W_U: expected finite weights, got NaN or infinity; look for a broken checkpoint")
    size = reach.double().square().mean().sqrt().item()
    if size and not 1e-30 < size < 1e30:
        raise ValueError(f"W_U: expected columns of lengths between 1e-30 and 1e30, got {size:.0e}; rescale W_U")
    return size or 1.0


def _plain_screen(W_U: Tensor, reach: Tensor) -> Screen:
    # Any order of summing, by fused or plain multiply-adds, and the roundings of x, w and the scale to float32.
    accumulation = 1.01 * (len(W_U) + 8) * FLOAT32_ROUNDOFF
    return Screen(
        weights=W_U,
        dtype=torch.float32,
        scaled=False,
        reach=reach,
        residual=torch.zeros_like(reach),
        accumulation=accumulation,
        rounding=8 * FLOAT32_ROUNDOFF,
    )


def _bf16_screen(W_U: Tensor, column_scale: Tensor | None, mean_column: Tensor, reach: Tensor) -> Screen:
    """W_U itself where it is held in bf16 and unscaled, else a bf16 copy, scaled and less its mean."""
    # Matrix units sum in float32 but may truncate where a CPU rounds: twice the roundoff.
    accumulation = 2.02 * (len(W_U) + 8) * FLOAT32_ROUNDOFF
    rounding = 1.01 * BF16_ROUNDOFF
    aligned = W_U.stride(0) == 1 or (W_U.stride(1) == 1 and W_U.shape[1] % 8 == 0)
    if W_U.dtype == torch.bfloat16 and column_scale is None and aligned:
        return Screen(W_U, torch.bfloat16, False, reach, torch.zeros_like(reach), accumulation, rounding)
    copy = torch.empty(W_U.shape[::-1], dtype=torch.bfloat16, device=W_U.device).T
    length, residual = torch.empty(2, W_U.shape[1], dtype=torch.float64, device=W_U.device)
    for part in parts(W_U.shape[1], PART_BYTES // (8 * len(W_U))):
        W = W_U[:, part].to(torch.float64, copy=True)
        if column_scale is not None:
            W *= column_scale[part]
        W -= mean_column[:, None]
        copy[:, part] = W
        length[part] = torch.linalg.vector_norm(copy[:, part].double(), dim=0)
        residual[part] = torch.linalg.vector_norm(W.sub_(copy[:, part]), dim=0)
    residual += 1e-12 * (reach + mean_column.norm())  # float64's own rounding, seen where columns are all but equal
    return Screen(
        weights=copy,
        dtype=torch.bfloat16,
        scaled=True,
        reach=_upper_float32(length),
        residual=_upper_float32(residual),
        accumulation=accumulation,
        rounding=rounding,
    )


def _upper_float32(lengths: Tensor) -> Tensor:
    return (lengths * (1 + 2.0**-22)).float()


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


# Shared by the modules of the engine ----------------------------------------------------------------------------------


def parts(total: int, size: int) -> Iterator[slice]:
    """Cut `range(total)` into the fewest nearly equal slices of at most `size` (at least 1)."""
    count = math.ceil(total / max(size, 1))
    for i in range(count):
        yield slice(total * i // count, total * (i + 1) // count)


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Keep products in the precision asked for: no autocast, no TF32, no bf16 partial sums. The bounds depend on it."""
    with ExitStack() as settings:
        settings.enter_context(torch.autocast(device.type, enabled=False))
        settings.enter_context(_set(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False))
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later; the older way may raise there
            for backend in (torch.backends.cuda, torch.backends.mkldnn):
                settings.enter_context(_set(getattr(backend, "matmul"), "fp32_precision", "ieee"))  # noqa: B009
        else:
            settings.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def _set(holder: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
