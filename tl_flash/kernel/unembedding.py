"""What is made of an unembedding once, for all layers: `Unembedding` and `prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tl_flash.kernel.alike import Alike
from tl_flash.kernel.arithmetic import HALVES_UNIT, MULTIPLIES_HALVES, PIECE_BYTES, halves, parts, plain_arithmetic
from tl_flash.kernel.checks import expect_float, expect_matrix, expect_one_of, token_ids
from tl_flash.kernel.kept import Kept, kept
from tl_flash.kernel.measures import Measures, measure, measure_cosine, typical_length
from tl_flash.kernel.screens import Screen, low_screen, needs_no_copy, plain_screen, screened_in

ROWS_TO_PAY = 1.0  # directions, in units of d_model, whose faster product is worth a copy of W_U and its covariance
_MAIN, _ROUNDS = 32, 8  # directions in which rounding is made up for, and rounds of finding them
_JITTER = 0.0, 1e-9, 1e-7, 1e-6  # of the mean variance, where a covariance is not positive definite


@dataclass(frozen=True, eq=False)
class Unembedding:
    """W_U prepared for all layers; made by `prepare`. What is found of it is found when first needed.

    `held_bytes` says how much memory that takes beside W_U: a few numbers a token, and where directions are screened
    in low precision W_U's covariance, [d_model, d_model], and unless W_U is held so a copy of it that is.
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
    low: torch.dtype | None
    #   in what many directions are screened, see `fast_dtype`; None where that is float32
    many: float
    #   as many directions or more
    kept: Kept
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
    def held_bytes(self) -> int:
        """Bytes held beside W_U."""
        return self.kept.nbytes + sum(copy.nbytes for copy in self._by_token)

    @property
    def measured(self) -> bool:
        """Whether W_U was measured."""
        return "measures" in self.kept.found

    @property
    def measures(self) -> Measures:
        """Mean and lengths of W_U's columns."""
        return self.kept.once("measures", self._measure)

    def _measure(self) -> Measures:
        with torch.no_grad(), plain_arithmetic(self.device):
            return measure(self.W_U) if self.score == "dot" else measure_cosine(self.W_U, self.gain, self.centre)

    def measure_with(self, rows: Tensor, scores: Tensor) -> None:
        """Measure W_U, and write the scores of rows, float32 [n, d_model], on every token."""
        self.kept.found["measures"] = measure(self.W_U, rows, scores)

    @property
    def column_scale(self) -> Tensor | None:
        """float64 [d_vocab], 1 / length of each column of W_U' under "cosine" (0 for a zero column)."""
        return None if self.score == "dot" else self.measures.column_scale

    @property
    def mean_column(self) -> Tensor:
        """float64 [d_model], the mean over the vocabulary of the (scaled) columns of W_U."""
        return self.measures.mean_column

    @cached_property
    def size(self) -> float:
        """Length of a typical column, the unit in which scores are screened: of all, or of some until these are."""
        if not self.measured and self.score == "dot":
            typical = typical_length(self.W_U)
            if 1e-30 < typical < 1e30:
                return typical
        return self.measures.size

    @cached_property
    def plain(self) -> Screen:
        """W_U itself, screened in float32."""
        return plain_screen(self.W_U, lambda: self.measures.reach)

    @cached_property
    def fast(self) -> Screen:
        """What screens many directions fastest on this device: plain, or one in low precision."""
        if self.low is None:
            return self.plain

        def make(dtype: torch.dtype = self.low) -> Screen:
            with torch.no_grad():
                return low_screen(self.W_U, dtype, self.measures, self._main_directions)

        if needs_no_copy(self.W_U, self.low, self.column_scale, self.measures.size):  # it would hold W_U alive
            return make()
        return self.kept.once(f"{self.low}, {self.precision}", make)

    def _main_directions(self) -> Tensor:
        """Where W_U's columns vary most, float32 [d_model, r] of orthogonal unit vectors; none where none is proven."""
        count = _MAIN if self.precision == "exact" and self.low == torch.bfloat16 and self.device.type == "cpu" else 0
        generator = torch.Generator().manual_seed(0)
        found = torch.randn(self.d_model, count, generator=generator).to(self.device)
        for _ in range(_ROUNDS if count else 0):
            found = torch.linalg.qr(self.covariance @ found).Q
        return found

    @property
    def covariance(self) -> Tensor:
        """float32 [d_model, d_model], the covariance over the vocabulary of W_U's (scaled) columns / measures.size."""
        return self.kept.once("covariance", lambda: _covariance(self))

    @property
    def root(self) -> Tensor:
        """float32 [d_model, d_model], R with R R' the covariance."""
        return self.kept.once("root", lambda: _root(self.covariance))

    @property
    def alike(self) -> Alike | None:
        """Tokens whose columns are next to the same, if there are any."""
        return self.kept.once("alike", lambda: Alike.of(self))

    def deviations(self, x: Tensor) -> Tensor:
        """Standard deviation over the vocabulary of the scores of unit rows x, float32 [n, d_model]: float64 [n].

        That is the length of R' x.
        """
        if x.is_cuda and MULTIPLIES_HALVES:
            high, low = halves(x)
            root = self.kept.once("root in halves", lambda: torch.cat(halves(self.root)[::-1]))  # low, then high
            small = torch.mm(torch.cat([high, low], dim=1), root, out_dtype=torch.float32)
            large = torch.mm(high, root[self.d_model :], out_dtype=torch.float32)
            moved = large.add_(small)  # in two sums: matrix units truncate
            return moved.norm(dim=1).double() * (self.measures.size / HALVES_UNIT**2)
        return (x @ self.root).norm(dim=1).double() * self.measures.size

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
    keep: bool = True,
) -> Unembedding:
    """Prepare an unembedding for `decode`, once for all layers.

    Where the device multiplies bf16 (a CPU) or float16 (a GPU) faster than float32, many directions are screened in it:
    against W_U itself if that is what it is held in, else against a copy. Elsewhere, and for few directions, there is
    no copy.

    What is found of W_U is kept as long as W_U is alive and is found again by its storage, unless its values changed:
    a second `prepare` reuses it. `held_bytes()` says how much memory that takes, `forget()` lets go of it.

    Args:
        W_U: [d_model, d_vocab], any float dtype, any strides; used as it is held.
        gain: [d_model], the scale of the final norm; None where it is folded already.
        centre: the final norm is a LayerNorm: directions lose their mean.
        score: "dot" (logits) or "cosine" (of x and the columns of W_U' = diag(gain) W_U).
        ignore: ids that are never reported. Statistics still run over the whole vocabulary.
        device: where to compute; W_U is moved there. By default where it is.
        precision: "exact" proves the tokens of every row, "fast" leaves out the proof.
        keep: read W_U now, to measure it or to see that it is as it was. False leaves that to the decode, which for a
            few directions reads it once in all: it goes by the version that torch counts, and measures W_U anew where
            the mean of the directions' scores is not the one expected. Weights that are not finite are refused then,
            and all is screened in float32. For cosines it makes no difference.

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
    keep |= score == "cosine"  # whose scores do not tell of every weight's length
    how = "dot" if score == "dot" else (None if gain is None else gain.cpu().numpy().tobytes(), centre)
    prepared = Unembedding(
        W_U=W_U,
        gain=gain,
        centre=centre,
        score=score,
        precision=precision,
        ignored=ignored,
        reportable=reportable,
        low=screened_in(W_U),
        many=ROWS_TO_PAY * len(W_U),
        kept=kept(W_U, how, summed=keep),
    )
    if keep:
        _ = prepared.measures
    return prepared


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


def _covariance(u: Unembedding) -> Tensor:
    """float32 products of parts of the vocabulary, summed in float64."""
    total = torch.zeros(u.d_model, u.d_model, dtype=torch.float64, device=u.device)
    columns = max(PIECE_BYTES[u.device.type] // (8 * u.d_model), u.d_model // 4)  # each of them smaller than the total
    wide = torch.float64 if u.W_U.dtype == torch.float64 else torch.float32
    mean, scale = u.mean_column.to(wide)[:, None], None if u.column_scale is None else u.column_scale.to(wide)
    with torch.no_grad(), plain_arithmetic(u.device):
        for part in parts(u.d_vocab, columns):
            W = u.W_U[:, part].to(wide, copy=True)
            if scale is not None:
                W *= scale[part]
            W = (W.sub_(mean) / u.measures.size).float()
            total += W @ W.T
    return (total / u.d_vocab).float()


def _root(covariance: Tensor) -> Tensor:
    """A lower triangular root, of a covariance with a little more where some direction has next to none."""
    wide = covariance.double()
    mean = wide.diagonal().mean()
    for jitter in _JITTER:
        root, failed = torch.linalg.cholesky_ex(wide + jitter * mean * torch.eye(len(wide), device=wide.device))
        if not failed:
            return root.float()
    variances, directions = torch.linalg.eigh(wide)
    return (directions * variances.clamp(min=0).sqrt()).float()
