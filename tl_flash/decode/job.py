"""One decode: everything that it depends on, its work unit by unit, and the map that is put together from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash import kernel
from tl_flash.decode.assembly import (
    assemble,
    divisor,
    is_centred,
    rows_of,
    versions,
    with_lengths,
    write_z,
    z_of,
)
from tl_flash.decode.feed import Feed
from tl_flash.decode.null import null_of, shuffled_rows, to_decode
from tl_flash.decode.options import Options
from tl_flash.decode.units import BLOCK, Part, Ready, Unit
from tl_flash.devices import device_of
from tl_flash.kernel import Readout, Unembedding, parts
from tl_flash.lens import JacobianLens
from tl_flash.maps import NeuronMap, Null, Source
from tl_flash.weights import MLPWeights, Sums, chosen_layers, combined, digest, read, require_side

_POLES = ("ids", "logits", "log_z", "write_z")
_NULL = ("null.z", "null.kurtosis")
_OTHERS = ("norm", "mean", "std", "kurtosis", "tracked")


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that one decode depends on, checked."""

    weights: MLPWeights
    options: Options
    layers: tuple[int, ...]
    tracked: list[int]
    """Ids of the tokens asked for."""
    ignored: list[int]
    """Ids that are never reported."""

    @classmethod
    def of(cls, model: Any, options: Options, *, tokenizer: Any = None) -> Job:
        """The work of `flash_decode`, not begun; refuses what it refuses, but for weights that are not finite."""
        device_of(options.device)
        weights = read(model, tokenizer=tokenizer)
        layers = tuple(chosen_layers(options.layers, weights.n_layers))
        require_side(options.side, weights.sides)
        if options.lens is not None:
            _made(options.lens).require_model(weights)
            if not options.fold_ln:
                raise ValueError("lens: it reads folded weights; expected fold_ln=True beside it, got False")
        _require_one_width(weights, layers)
        vocab = weights.vocab
        tracked, ignored = vocab.ids(options.tokens or []), vocab.ids(options.ignore_tokens or [])
        return cls(weights, options, layers, tracked, vocab.nameless() + ignored)

    @property
    def lens(self) -> JacobianLens | None:
        """What carries the writes."""
        return None if self.options.lens is None else _made(self.options.lens)

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
        weights, options = self.weights, self.options
        return kernel.prepare(
            weights.W_U,
            gain=weights.final_gain if options.fold_ln else None,
            centre=weights.centre and options.fold_ln,
            score=options.score,
            ignore=self.ignored,
            device=options.device,
            precision=options.precision,
        )

    @cached_property
    def unembedding_digest(self) -> str:
        """Of W_U, as held."""
        return self.unembedding.kept.once("digest", lambda: digest(self.weights.W_U.T))

    def run(self, units: Sequence[Unit]) -> Iterator[Part]:
        """Decode units, in order; the next one's weights are read meanwhile.

        Raises:
            ValueError: weights that cannot be read or decoded, once the units before them are done.
        """
        feed = Feed(map(self.read, units), ahead=self.weights.on_disk)
        readouts = kernel.decode_each(
            feed, self.unembedding, k=self.options.k, tracked=self.tracked, max_bytes=self.options.max_bytes
        )
        while True:
            try:
                readout = next(readouts, None)
            except ValueError as error:
                where = f"{feed.waiting[0].unit}, side {self.options.side!r}: " if feed.waiting else ""
                raise ValueError(f"{where}{error}") from error
            if readout is None:
                break
            yield self._part(feed.waiting.popleft(), readout)
        if feed.failure is not None:
            raise feed.failure

    def read(self, unit: Unit) -> Ready:
        """The directions of a unit, on the device."""
        device = self.unembedding.device
        held = self.weights.held(unit.layer, self.options.side, unit.neurons, device)
        writes = self._writes(unit.layer, unit.neurons)
        x = writes if self.options.side == "out" else self._directions(unit.layer, unit.neurons)
        rows = torch.cat([x, to_decode(self._shuffled(unit, x), self.unembedding)]) if unit.null else x
        uncentred = self.weights.centre and not self.options.fold_ln
        norm = divisor(rows, centred=uncentred, final_norm=self.weights.final_norm)
        return Ready(unit, Sums.of(held), rows, norm, writes)

    def _writes(self, layer: int, neurons: slice) -> Float[Tensor, "n d_model"]:
        device = self.unembedding.device
        writes = self.weights.directions(layer, "out", fold_ln=self.options.fold_ln, neurons=neurons, device=device)
        return writes if self.lens is None else self.lens.carry(writes, layer)

    def _directions(self, layer: int, neurons: slice) -> Float[Tensor, "n d_model"]:
        if self.options.side == "out":
            return self._writes(layer, neurons)
        device = self.unembedding.device
        return self.weights.directions(
            layer, self.options.side, fold_ln=self.options.fold_ln, neurons=neurons, device=device
        )

    def _shuffled(self, unit: Unit, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "draw d_model"]:
        """The layer's null, gathered block by block; x is the unit's own block."""
        blocks = [other for other in self.units if other.layer == unit.layer]
        rows = shuffled_rows(unit.stop, x.shape[1], seed=unit.layer).to(x.device).long()
        drawn = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        for block in blocks:
            from_block = x if block == unit else self._directions(block.layer, block.neurons)
            here = (rows >= block.start) & (rows < block.stop)
            places = (rows - block.start).clamp(0, len(from_block) - 1)
            drawn = torch.where(here, from_block.gather(0, places), drawn)
        return drawn

    def _part(self, read: Ready, readout: Readout) -> Part:
        n = len(read.writes)
        own = rows_of(readout, slice(n))
        if not self.weights.final_norm:
            own = with_lengths(own, read.rows[:n])
        tensors = {name: getattr(own, name) for name in ("ids", "logits", "log_z", *_OTHERS)}
        if self.options.side == "out":
            tensors["write_z"] = z_of(own)
        else:
            tensors["write_z"] = write_z(read.writes, own.ids, self.unembedding)
        if read.unit.null:
            tensors |= null_of(rows_of(readout, slice(n, None)))
        return Part(read.unit, read.sums.digest(), readout.repaired, tensors)

    def assemble(self, done: Iterable[Part]) -> NeuronMap:
        """The map of all units' parts, in whatever order they come."""
        by_unit = {part.unit: part for part in done}
        ordered = [by_unit[unit] for unit in self.units]
        layers = [list(group) for _, group in groupby(ordered, key=lambda part: part.unit.layer)]
        tensors = {}
        for name in (*_POLES, *_OTHERS):
            dim = int(name in _POLES)
            tensors[name] = torch.stack([torch.cat([part.tensors[name] for part in layer], dim) for layer in layers])
        weights = self.weights
        return assemble(
            tensors,
            Null(*(torch.stack([layer[-1].tensors[name] for layer in layers]) for name in _NULL)),
            self.tracked,
            weights.vocab,
            side=self.options.side,
            score=self.options.score,
            n_layers=weights.n_layers,
            layers=self.layers,
            n_experts=self.n_experts,
            d_model=weights.d_model,
            source=Source(
                model=weights.name,
                model_class=weights.class_name,
                fingerprint=combined([self.unembedding_digest, *(part.digest for part in ordered)]),
                dtype=weights.dtype,
                fold_ln=self.options.fold_ln,
                lens=None if self.lens is None else self.lens.fingerprint,
                lens_made=None if self.lens is None else self.lens.source.made,
                center_unembed=is_centred(self.unembedding),
                precision=self.options.precision,
                repaired=sum(part.repaired for part in ordered),
                versions=versions(),
                final_norm=weights.final_norm,
                stored=weights.stored,
            ),
        )


def _made(lens: JacobianLens | str) -> JacobianLens:
    if not isinstance(lens, JacobianLens):
        raise TypeError(f'lens: expected a JacobianLens or "auto", got {lens!r}; make one with jacobian_lens')
    return lens


def _require_one_width(weights: MLPWeights, layers: Sequence[int]) -> None:
    weights.require_layers(layers)
    widths = {layer: weights.layer(layer).widths for layer in layers}
    for layer, own in widths.items():
        if len(set(own)) > 1:
            raise ValueError(
                f"layer {layer}: its shared expert has {own[-1]} neurons, no multiple of the {own[0]} of a routed one, "
                "and a map holds experts of one width; decode_directions takes what "
                "weights.read(model).directions(layer, side) gives: the routed experts' neurons, then the shared one's"
            )
        if own != widths[layers[0]]:
            raise ValueError(
                f"layers: layer {layer} has {_describe(weights, layer)}, layer {layers[0]} has "
                f"{_describe(weights, layers[0])}; decode layers of one width at a time with layers="
            )


def _describe(weights: MLPWeights, layer: int) -> str:
    read = weights.layer(layer)
    return f"{read.d_mlp} neurons" if read.n_experts is None else f"{read.n_experts} experts of {read.d_mlp} neurons"
