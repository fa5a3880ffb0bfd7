"""The streaming decode: tile after tile of directions, a layer queued while the one before is waited for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tl_flash.kernel.arithmetic import parts, plain_arithmetic
from tl_flash.kernel.checks import (
    expect_bytes,
    expect_count,
    expect_finite,
    expect_in_range,
    expect_matrix,
    expect_norm,
    token_ids,
)
from tl_flash.kernel.directions import Directions
from tl_flash.kernel.plan import Plan
from tl_flash.kernel.readout import Readout
from tl_flash.kernel.rescore import Rescorer
from tl_flash.kernel.screens import Screen
from tl_flash.kernel.statistics import statistics
from tl_flash.kernel.tiles import Tile, Top
from tl_flash.kernel.unembedding import Unembedding
from tl_flash.kernel.upload import uploaded

LEAST_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # of scratch, where the caller does not say


def decode(
    x: Tensor,
    unembedding: Unembedding,
    *,
    k: int = 10,
    tracked: Sequence[int] | Tensor | None = None,
    norm: Tensor | None = None,
    max_bytes: int | None = None,
) -> Readout:
    """Decode directions: their top tokens at both poles, and statistics over the vocabulary.

    Args:
        x: [n, d_model], any float dtype, on any device.
        unembedding: what `prepare` made.
        k: how many tokens to name at each pole.
        tracked: ids whose scores to keep for every direction.
        norm: [n], the length to take for ||x|| in tau = sqrt(d_model) / ||x||. By default x's own.
        max_bytes: scratch memory beyond the results; by default as much as W_U takes, but at least 256 MiB and on a
            GPU 2 GiB. W_U counts twice where it is not held by token, [d_vocab, d_model] transposed: where many
            directions are decoded a copy of it is made that is, see `Unembedding.by_token`.

    Returns:
        Readout: ids, logits, mean and tracked are exact scores, rounded to float32. The other statistics are as good
            as float32 sums of float32 scores, also where scores are screened in bf16 or float16: see `statistics`.
            Under precision="fast" they carry what rounding leaves, in log_z up to some 1e-2, or 2^-8 of it where a
            token that is ignored dominates. A direction that is zero, once centred and times gain, or whose norm is
            given as 0, has no reading: see Readout.

    Raises:
        TypeError: x or norm is not a float tensor, k or max_bytes not a whole number, or tracked holds something other
            than ids.
        ValueError: a shape, a non-finite direction, logits beyond float32, an id out of range, a k below 1 or
            above the number of reportable tokens, a max_bytes too small for one row.
    """
    return next(decode_each([(x, norm)], unembedding, k=k, tracked=tracked, max_bytes=max_bytes))


def decode_each(
    layers: Iterable[tuple[Tensor, Tensor | None]],
    unembedding: Unembedding,
    *,
    k: int = 10,
    tracked: Sequence[int] | Tensor | None = None,
    max_bytes: int | None = None,
) -> Iterator[Readout]:
    """Decode layer after layer, each a pair (x, norm) as `decode` takes them; yields their Readouts in order.

    Scratch memory is shared by all. On a GPU a layer is queued before the one before it is waited for, so that the
    device does not idle while the host reads weights; it holds two layers at a time. Raises what `decode` raises, once
    the layer's Readout is asked for.
    """
    u = unembedding
    expect_count(k, u.d_vocab - len(u.ignored))
    followed = token_ids("tracked", tracked, u.d_vocab).to(u.device)
    if max_bytes is None:
        max_bytes = max(LEAST_BYTES[u.device.type], u.W_U.nbytes)
        if u.W_U.stride(0) != 1:
            max_bytes += u.W_U.nbytes
    expect_bytes(max_bytes)
    tiles = _Tiles(max_bytes, k, u)
    waiting: list[tuple[Tensor, Tensor | None, dict[str, Tensor]]] = []
    for x, norm in layers:
        expect_matrix("x", x, f"[n, {u.d_model}]", width=u.d_model)
        if norm is not None:
            expect_norm(norm, len(x))
        waiting.append((x, norm, _decode(x, norm, k, followed, tiles)))
        if len(waiting) > (u.device.type == "cuda"):
            x, norm, results = waiting.pop(0)
            yield _finish(x, norm, results, tiles)
    for x, norm, results in waiting:
        yield _finish(x, norm, results, tiles)


class _Tiles:
    """Two tiles in one piece of scratch memory: one that is fast for many directions, one in float32."""

    def __init__(self, max_bytes: int, k: int, u: Unembedding):
        self.u, self.max_bytes, self.k = u, max_bytes, k
        self.rows, self.by_token = 0, True  # decoded so far; whether all have room for a copy of W_U by token
        self._scratch = torch.empty(0, dtype=torch.uint8, device=u.device)

    def of(self, n: int) -> Tile:
        """What n directions more are screened with."""
        self.rows += n
        return self.fast if self.rows >= self.u.many and self.u.kept.summed else self.plain

    @cached_property
    def plain(self) -> Tile:
        """In float32: for few directions, and to repair with."""
        [plan] = self._plans(self.u.plain)
        return Tile(plan, self.u.plain, self.u, self._scratch, Rescorer(self.u, plan.pairs))

    @cached_property
    def fast(self) -> Tile:
        """In what is fastest on this device."""
        plan, _ = self._plans(self.u.fast, self.u.plain)
        self.__dict__.pop("plain", None)  # one that shares the scratch takes its place
        return Tile(plan, self.u.fast, self.u, self._scratch, Rescorer(self.u, plan.pairs))

    def _plans(self, *screens: Screen) -> list[Plan]:
        """A plan for each screen, with scratch for whichever wants most."""
        plans = [Plan.within(self.max_bytes, self.u, screen, self.k) for screen in screens]
        self.by_token = all(plan.by_token for plan in plans)
        most = max(plan.buffer_bytes for plan in plans)
        if len(self._scratch) < most:
            self._scratch = torch.empty(most, dtype=torch.uint8, device=self.u.device)
        return plans


def _decode(x: Tensor, norm: Tensor | None, k: int, followed: Tensor, tiles: _Tiles) -> dict[str, Tensor]:
    """Everything but the slower repairs, left on the device. On a GPU nothing here waits for the device."""
    u, out = tiles.u, _empty_results(len(x), k, len(followed), tiles.u.device)
    with torch.no_grad(), plain_arithmetic(u.device):
        tile = tiles.of(len(x))
        if tiles.by_token and 2 * k * tiles.rows > u.d_vocab:  # more columns gathered than there are
            u.hold_by_token()
        for rows, some in uploaded(x, tile.plan.rows, u.device):
            d = Directions.of(some, None if norm is None else norm[rows], u)
            tile.fill(d)
            top = tile.top_tokens(k)
            top.unproven.logical_and_(~d.zero)
            out["finite"][rows], out["zero"][rows] = d.finite, d.zero
            out["repaired"][rows] = top.unproven.any(0)
            if u.device.type == "cpu" and u.precision == "exact":
                tile.repair(top, at_once=True)
            found, doubtful = statistics(tile, top)
            out["std"][rows], out["kurtosis"][rows], out["log_z"][:, rows] = found
            out["again"][rows] = (top.unproven.any(0) & (u.precision == "exact")) | (doubtful & ~d.zero)
            out["norm"][rows], out["mean"][rows] = d.norm, d.mean
            out["tracked"][rows] = _followed_scores(d, followed, u)
            _keep(top, d, rows, out, u)
    return out


def _finish(x: Tensor, norm: Tensor | None, out: dict[str, Tensor], tiles: _Tiles) -> Readout:
    """Wait for a layer, refuse what cannot be read, repair what is not proven."""
    expect_finite(out.pop("finite"))
    u = tiles.u
    again, repaired = out.pop("again").nonzero()[:, 0], int(out.pop("repaired").sum())
    if len(again):
        _do_again(again, x, norm, out, tiles.plain)
    _blank(out, out.pop("zero"))
    expect_in_range(out)
    repaired = 0 if u.precision == "fast" else repaired
    return Readout(**{name: tensor.cpu() for name, tensor in out.items()}, repaired=repaired)


def _do_again(again: Tensor, x: Tensor, norm: Tensor | None, out: dict[str, Tensor], tile: Tile) -> None:
    """Decode some rows in float32."""
    u = tile.u
    with torch.no_grad(), plain_arithmetic(u.device):
        for part in parts(len(again), tile.plan.rows):
            rows = again[part]
            on_x = rows.to(x.device)
            d = Directions.of(x[on_x], None if norm is None else norm[rows.to(norm.device)], u)
            tile.fill(d)
            top = tile.top_tokens(out["ids"].shape[-1])
            tile.repair(top, at_once=False)
            std, kurtosis, log_z = (each.float() for each in statistics(tile, top)[0])
            out["std"][rows], out["kurtosis"][rows], out["log_z"][:, rows] = std, kurtosis, log_z
            _keep(top, d, rows, out, u)


def _blank(out: dict[str, Tensor], zero: Tensor) -> None:
    """Leave zero directions without a reading; zero is bool [n]."""
    for name in ("logits", "log_z", "mean", "std", "kurtosis", "tracked"):
        of_row = out[name].transpose(0, 1) if name in ("logits", "log_z") else out[name]
        of_row[zero] = math.nan
    out["norm"][zero] = 0
    out["ids"][:, zero] = -1


def _keep(top: Top, d: Directions, rows: slice | Tensor, out: dict[str, Tensor], u: Unembedding) -> None:
    """Write top tokens into their rows of the results."""
    mean = torch.stack([d.mean, -d.mean])[..., None]
    out["ids"][:, rows] = top.ids.int()
    out["logits"][:, rows] = (top.scores - mean if u.score == "dot" else top.scores).float()


def _empty_results(n: int, k: int, n_tracked: int, device: torch.device) -> dict[str, Tensor]:
    shapes = {"logits": (2, n, k), "log_z": (2, n), "tracked": (n, n_tracked)}
    shapes |= dict.fromkeys(("norm", "mean", "std", "kurtosis"), (n,))
    flags = dict.fromkeys(("finite", "zero", "again", "repaired"), (n,))
    out = {name: torch.empty(shape, dtype=torch.float32, device=device) for name, shape in shapes.items()}
    out |= {name: torch.empty(shape, dtype=torch.bool, device=device) for name, shape in flags.items()}
    return out | {"ids": torch.empty(2, n, k, dtype=torch.int32, device=device)}


def _followed_scores(d: Directions, ids: Tensor, u: Unembedding) -> Tensor:
    scores = torch.empty(len(d.rows), len(ids), dtype=torch.float64, device=u.device)
    for part in parts(len(ids), 256):
        scores[:, part] = d.rows @ u.W_U[:, ids[part]].double()
    return scores - d.mean[:, None] if u.column_scale is None else scores * u.column_scale[ids]
