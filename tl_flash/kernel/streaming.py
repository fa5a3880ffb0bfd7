"""The streaming decode: tile after tile of directions, a layer queued while the one before is waited for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

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
from tl_flash.kernel.plan import Plan
from tl_flash.kernel.readout import Readout
from tl_flash.kernel.rescore import Rescorer
from tl_flash.kernel.tiles import Directions, Tile, Top
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
            GPU 2 GiB. On a CPU W_U counts twice where it is not held by token, [d_vocab, d_model] transposed: where
            many directions are decoded a copy of it is made that is, see `Unembedding.by_token`.

    Returns:
        Readout: ids, logits, mean and tracked are exact scores, rounded to float32. The other statistics are as good
            as float32 sums where scores are screened in float32. Where they are screened in bf16 the terms of the top
            tokens are exact too and the rest carries its rounding: on random weights of GPT-2's shape log_z was right
            to 3e-3, std to 1 in 10,000, kurtosis to 1e-3. A direction that is zero, once centred and times gain, or
            whose norm is given as 0, has no reading: see Readout.

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
        if u.device.type == "cpu" and u.W_U.stride(0) != 1:
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
    """Two tiles in one piece of scratch memory: one to decode with, one in float32 to repair with."""

    def __init__(self, max_bytes: int, k: int, u: Unembedding):
        plans = [Plan.within(max_bytes, u, screen, k) for screen in (u.fast, u.plain)]
        scratch = torch.empty(max(plan.buffer_bytes for plan in plans), dtype=torch.uint8, device=u.device)
        rescorer = Rescorer(u, min(plan.pairs for plan in plans))
        screens = (u.fast, u.plain)
        self.fast, self.plain = (Tile(p, s, u, scratch, rescorer) for p, s in zip(plans, screens, strict=True))
        self.by_token = all(plan.by_token for plan in plans)
        self.rows = 0  # decoded so far


def _decode(x: Tensor, norm: Tensor | None, k: int, followed: Tensor, tiles: _Tiles) -> dict[str, Tensor]:
    """Everything but the slower repairs, left on the device. On a GPU nothing here waits for the device."""
    tile = tiles.fast
    u, out = tile.u, _empty_results(len(x), k, len(followed), tile.u.device)
    with torch.no_grad(), plain_arithmetic(u.device):
        tiles.rows += len(x)
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
            out["unproven"][rows] = top.unproven.any(0)
            out["std"][rows], out["kurtosis"][rows], out["log_z"][:, rows] = tile.statistics(top)
            out["norm"][rows], out["mean"][rows] = d.norm, d.mean
            out["tracked"][rows] = _followed_scores(d, followed, u)
            _keep(top, d, rows, out, u)
    return out


def _finish(x: Tensor, norm: Tensor | None, out: dict[str, Tensor], tiles: _Tiles) -> Readout:
    """Wait for a layer, refuse what cannot be read, repair what is not proven."""
    expect_finite(out.pop("finite"))
    u, tile = tiles.fast.u, tiles.plain
    unproven, repaired = out.pop("unproven").nonzero()[:, 0], int(out.pop("repaired").sum())
    if u.precision == "fast":
        unproven, repaired = unproven[:0], 0
    with torch.no_grad(), plain_arithmetic(u.device):
        for part in parts(len(unproven), tile.plan.rows):
            rows = unproven[part]
            on_x = rows.to(x.device)
            d = Directions.of(x[on_x], None if norm is None else norm[rows.to(norm.device)], u)
            tile.fill(d)
            top = tile.top_tokens(out["ids"].shape[-1])
            tile.repair(top, at_once=False)
            _keep(top, d, rows, out, u)
    _blank(out, out.pop("zero"))
    expect_in_range(out)
    return Readout(**{name: tensor.cpu() for name, tensor in out.items()}, repaired=repaired)


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
    flags = dict.fromkeys(("finite", "zero", "unproven", "repaired"), (n,))
    out = {name: torch.empty(shape, dtype=torch.float32, device=device) for name, shape in shapes.items()}
    out |= {name: torch.empty(shape, dtype=torch.bool, device=device) for name, shape in flags.items()}
    return out | {"ids": torch.empty(2, n, k, dtype=torch.int32, device=device)}


def _followed_scores(d: Directions, ids: Tensor, u: Unembedding) -> Tensor:
    scores = torch.empty(len(d.rows), len(ids), dtype=torch.float64, device=u.device)
    for part in parts(len(ids), 256):
        scores[:, part] = d.rows @ u.W_U[:, ids[part]].double()
    return scores - d.mean[:, None] if u.column_scale is None else scores * u.column_scale[ids]
