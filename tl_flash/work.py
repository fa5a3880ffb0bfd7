"""One decode cut into units of work, which any process may do in any order, and put together into one map."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash import kernel
from tl_flash.assembly import assemble, null_of, rows_of, shuffled_rows, versions, write_z
from tl_flash.kernel import Readout, Unembedding
from tl_flash.kernel.unembedding import parts
from tl_flash.lens import JacobianLens
from tl_flash.neuron_map import NeuronMap, Source
from tl_flash.weights import MLPWeights, Sums, combined, digest, is_centred

BLOCK = 4096
"""Neurons of a unit at most. It must not depend on the machine: a fingerprint is made of blocks."""
_POLES = ("ids", "logits", "log_z", "write_z")
_NULL = ("null.z", "null.kurtosis")
_OTHERS = ("norm", "mean", "std", "kurtosis", "tracked")

T = TypeVar("T")


class Unit(NamedTuple):
    """Neurons of one layer that are decoded together."""

    layer: int
    start: int
    stop: int
    null: bool
    """Whether the layer's null is decoded with them."""

    @property
    def neurons(self) -> slice:
        """Which of the layer's neurons."""
        return slice(self.start, self.stop)

    def __str__(self) -> str:
        return f"layer {self.layer}, neurons {self.start} to {self.stop - 1}"


@dataclass(frozen=True, eq=False)
class Part:
    """What decoding one unit gave."""

    unit: Unit
    digest: str
    """Of the weights decoded, as held."""
    repaired: int
    tensors: dict[str, Tensor]
    """ids, logits, write_z [pole, neuron, k], log_z [pole, neuron], norm, mean, std, kurtosis [neuron] and tracked
    [neuron, token]; with the null, null.z and null.kurtosis [draw], sorted upwards."""


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that one decode depends on."""

    weights: MLPWeights
    layers: tuple[int, ...]
    side: str
    score: str
    k: int
    fold_ln: bool
    tracked: list[int]
    ignored: list[int]
    lens: JacobianLens | None
    precision: str
    device: torch.device | None
    max_bytes: int | None

    def __post_init__(self) -> None:
        self.weights.require_layers(self.layers)
        shapes = {layer: (read.n_experts, read.d_mlp) for layer in self.layers for read in [self.weights.layer(layer)]}
        for layer, shape in shapes.items():
            if shape != shapes[self.layers[0]]:
                raise ValueError(
                    f"layers: layer {layer} has {_describe(*shape)}, layer {self.layers[0]} has "
                    f"{_describe(*shapes[self.layers[0]])}; decode layers of one width at a time with layers="
                )

    @cached_property
    def n_experts(self) -> int | None:
        """Experts of each layer, None where the MLPs are dense."""
        return self.weights.layer(self.layers[0]).n_experts

    @cached_property
    def units(self) -> list[Unit]:
        """The work, layer by layer, in blocks of nearly equal size; the null goes with a layer's last one."""
        n = self.weights.layer(self.layers[0]).n_neurons
        blocks = list(parts(n, BLOCK))
        return [Unit(layer, b.start, b.stop, b is blocks[-1]) for layer in self.layers for b in blocks]

    @cached_property
    def unembedding(self) -> Unembedding:
        """W_U, prepared."""
        weights, fold_ln = self.weights, self.fold_ln
        return kernel.prepare(
            weights.W_U,
            gain=weights.final_gain if fold_ln else None,
            centre=weights.centre and fold_ln,
            score=self.score,
            ignore=self.ignored,
            device=self.device,
            precision=self.precision,
        )

    @cached_property
    def unembedding_digest(self) -> str:
        """Of W_U, as held."""
        return digest(self.weights.W_U.T)

    def run(self, units: Sequence[Unit]) -> Iterator[Part]:
        """Decode units, in order; the next one's weights are read meanwhile.

        Raises:
            ValueError: weights that cannot be read or decoded, once the units before them are done.
        """
        feed = _Feed(self, units)
        readouts = kernel.decode_each(feed, self.unembedding, k=self.k, tracked=self.tracked, max_bytes=self.max_bytes)
        while True:
            try:
                readout = next(readouts, None)
            except ValueError as error:
                where = f"{feed.waiting[0].unit}, side {self.side!r}: " if feed.waiting else ""
                raise ValueError(f"{where}{error}") from error
            if readout is None:
                break
            yield self._part(feed.waiting.popleft(), readout)
        if feed.failure is not None:
            raise feed.failure

    def read(self, unit: Unit) -> _Read:
        """The directions of a unit, on the device."""
        device = self.unembedding.device
        held = self.weights.held(unit.layer, self.side, unit.neurons, device)
        writes = self._writes(unit.layer, unit.neurons)
        x = writes if self.side == "out" else self._directions(unit.layer, unit.neurons)
        rows = torch.cat([x, self._shuffled(unit, x)]) if unit.null else x
        uncentred = self.weights.centre and not self.fold_ln
        norm = (rows - rows.mean(-1, keepdim=True)).norm(dim=-1) if uncentred else None
        return _Read(unit, Sums.of(held), rows, norm, writes)

    def _writes(self, layer: int, neurons: slice) -> Float[Tensor, "n d_model"]:
        device = self.unembedding.device
        writes = self.weights.directions(layer, "out", fold_ln=self.fold_ln, neurons=neurons, device=device)
        return writes if self.lens is None else self.lens.carry(writes, layer)

    def _directions(self, layer: int, neurons: slice) -> Float[Tensor, "n d_model"]:
        if self.side == "out":
            return self._writes(layer, neurons)
        device = self.unembedding.device
        return self.weights.directions(layer, self.side, fold_ln=self.fold_ln, neurons=neurons, device=device)

    def _shuffled(self, unit: Unit, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "draw d_model"]:
        """The layer's null, gathered block by block; x is the unit's own block."""
        blocks = [other for other in self.units if other.layer == unit.layer]
        rows = shuffled_rows(unit.stop, x.shape[1], seed=unit.layer).to(x.device)
        drawn = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        for block in blocks:
            from_block = x if block == unit else self._directions(block.layer, block.neurons)
            here = (rows >= block.start) & (rows < block.stop)
            places = (rows - block.start).clamp(0, len(from_block) - 1)
            drawn = torch.where(here, from_block.gather(0, places), drawn)
        return drawn

    def _part(self, read: _Read, readout: Readout) -> Part:
        n = len(read.writes)
        own = rows_of(readout, slice(n))
        tensors = {name: getattr(own, name) for name in ("ids", "logits", "log_z", *_OTHERS)}
        tensors["write_z"] = write_z(read.writes, own.ids, self.unembedding)
        if read.unit.null:
            tensors |= null_of(rows_of(readout, slice(n, None)))
        return Part(read.unit, read.sums.digest(), readout.repaired, tensors)

    def assemble(self, done: Iterable[Part]) -> NeuronMap:
        """The map of all units' parts, in whatever order they come."""
        by_unit = {part.unit: part for part in done}
        ordered = [by_unit[unit] for unit in self.units]
        layers = [list(group) for _, group in groupby(ordered, key=lambda part: part.unit.layer)]
        tensors = {name: torch.stack([layer[-1].tensors[name] for layer in layers]) for name in _NULL}
        for name in (*_POLES, *_OTHERS):
            dim = int(name in _POLES)
            tensors[name] = torch.stack([torch.cat([part.tensors[name] for part in layer], dim) for layer in layers])
        weights = self.weights
        return assemble(
            tensors,
            self.tracked,
            weights.vocab,
            side=self.side,
            score=self.score,
            n_layers=weights.n_layers,
            layers=self.layers,
            n_experts=self.n_experts,
            d_model=weights.d_model,
            source=Source(
                model=weights.name,
                model_class=weights.class_name,
                fingerprint=combined([self.unembedding_digest, *(part.digest for part in ordered)]),
                dtype=weights.dtype,
                fold_ln=self.fold_ln,
                lens=None if self.lens is None else self.lens.fingerprint,
                center_unembed=is_centred(weights.W_U),
                precision=self.precision,
                repaired=sum(part.repaired for part in ordered),
                versions=versions(),
            ),
        )


class _Read(NamedTuple):
    """A unit ready to decode."""

    unit: Unit
    sums: Sums
    rows: Float[Tensor, "n d_model"]
    norm: Float[Tensor, " n"] | None
    writes: Float[Tensor, "n d_model"]


class _Feed:
    """Units on their way through the engine; one that cannot be read ends the feed, and those before it are done."""

    def __init__(self, job: Job, units: Iterable[Unit]) -> None:
        self.waiting: deque[_Read] = deque()
        self.failure: ValueError | OSError | None = None
        reads = map(job.read, units)
        self._reads = _ahead(reads) if job.weights.on_disk else reads

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        while True:
            try:
                read = next(self._reads, None)
            except (ValueError, OSError) as error:
                self.failure = error
                return
            if read is None:
                return
            self.waiting.append(read)
            yield read.rows, read.norm


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Make each item, none of them None, while the one before is in use: in a thread, one ahead and no more.

    Products of matrices are cut evenly over all cores and wait for the slowest, so the thread takes few of them.
    """
    with ThreadPoolExecutor(1) as thread:
        threads = torch.get_num_threads()
        if "OpenMP" in torch.__config__.parallel_info():  # where each thread has a number of its own, ...
            thread.submit(_use_threads, max(threads // 4, 1)).result()
            torch.set_num_threads(threads)  # ... and the number told last is every new thread's
        made = thread.submit(next, items, None)
        while (item := made.result()) is not None:
            made = thread.submit(next, items, None)
            yield item


def _use_threads(count: int) -> None:
    torch.get_num_threads()  # a thread takes the common number when it first asks
    torch.set_num_threads(count)


def _describe(n_experts: int | None, d_mlp: int) -> str:
    return f"{d_mlp} neurons" if n_experts is None else f"{n_experts} experts of {d_mlp} neurons"
