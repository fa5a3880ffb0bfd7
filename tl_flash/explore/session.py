"""The model behind the page, its maps as they are made, and what was measured of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tl_flash.clamps import ActivationStats, Prompts, activation_stats, require_hooks
from tl_flash.decode import flash_decode
from tl_flash.explore.jobs import Cancelled, Jobs
from tl_flash.lens import own_texts
from tl_flash.maps import NeuronMap
from tl_flash.names import Neuron, shown_model
from tl_flash.progress import watching
from tl_flash.show.report import contents, given, pack
from tl_flash.weights import MLPWeights, read, require_side

N_TEXTS = 12
"""Of the package's texts, on which a neuron's range is measured unless others are given."""
REMEMBERED = 16
_FIRST = ("out", "in", "gate")

Key = TypeVar("Key")
Value = TypeVar("Value")


class Memory(OrderedDict[Key, Value]):
    """The last few results, by what was asked."""

    def keep(self, key: Key, value: Value) -> Value:
        """Remember one, and forget the oldest of too many."""
        self[key] = value
        self.move_to_end(key)
        if len(self) > REMEMBERED:
            self.popitem(last=False)
        return value


class Session:
    """One model, served.

    The model runs in the jobs' one worker and nowhere else. Maps are made beside it, from weights alone, in a thread
    that waits while a job runs.

    Args:
        model: a HookedTransformer or a TransformerBridge with a tokenizer.
        maps: sides of it that are decoded already.
        sides: those to decode beside them; by default all others.
        texts: on which neurons' ranges are measured; by default some of the package's own.

    Raises:
        TypeError: no such model, or maps that are none.
        ValueError: a model without a tokenizer, maps of another model, a side that it has not, or no text.
    """

    def __init__(
        self,
        model: Any,
        maps: Sequence[NeuronMap] = (),
        *,
        sides: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        require_hooks(model)
        if getattr(model, "tokenizer", None) is None:
            raise ValueError("model: it has no tokenizer, so nothing can be asked of it; set model.tokenizer")
        weights = self.weights = read(model)
        maps = given.listed(maps, NeuronMap, "maps")
        if maps:
            given.require_alike(maps)
        for map in maps:
            _require_own(map, weights)
        self.model, self.jobs = model, Jobs()
        self.name, self.d_vocab = shown_model(weights.name), weights.d_vocab
        self.vocab = weights.vocab
        self.chats = bool(getattr(model.tokenizer, "chat_template", None))
        self.specials = frozenset(getattr(model.tokenizer, "all_special_ids", ()))
        self._texts = Prompts.of(model, own_texts(model).rows[:N_TEXTS] if texts is None else texts)
        self.written: Memory[Any, Any] = Memory()
        self.found: Memory[Any, Any] = Memory()
        self._stats: dict[int, ActivationStats] = {}
        self.data: dict[str, str] = {}
        """What the page fetches, by name."""
        self.sides: list[dict[str, Any]] = []
        """Those decoded, as the page is told of them."""
        self.decoding: dict[str, Any] | None = None
        self._closed = False
        self._maps = {map.side: map for map in maps}
        for side in sides or ():
            require_side(side, weights.sides)
        wanted = [side for side in _FIRST if side in weights.sides] if sides is None else sides
        self._order = list(dict.fromkeys([*self._maps, *wanted]))
        self._thread = ThreadPoolExecutor(1, "maps")
        self._made: Future[None] | None = None

    def prepare(self) -> None:
        """Begin to decode what is not decoded."""
        self._made = self._thread.submit(self._make)
        self._thread.shutdown(wait=False)  # so that the thread ends with its work, see `apart`

    def trouble(self) -> str | None:
        """Why there are no more maps, where decoding failed."""
        done = self._made is not None and self._made.done()
        error = self._made.exception() if done and self._made is not None else None
        return None if error is None or isinstance(error, Cancelled) else f"{error}"

    def close(self) -> None:
        """Cancel what runs."""
        self._closed = True
        self.jobs.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def range_of(self, neuron: Neuron) -> dict[str, float]:
        """How a neuron's activation is distributed over the session's texts; a layer is measured once."""
        if neuron.layer not in self._stats:
            self._stats[neuron.layer] = activation_stats(
                self.model, list(self._texts.rows), layers=[neuron.layer], quantiles=(0.01, 0.5, 0.99), sample=256
            )
        own = self._stats[neuron.layer][neuron]
        return {"mean": own.mean, "std": own.std, "min": own.min, "max": own.max, "abs_max": own.abs_max}

    def unit_of(self, neuron: Neuron) -> float:
        """A neuron's max|hook_post| over the session's texts.

        Raises:
            ValueError: it is 0.
        """
        largest = self.range_of(neuron)["abs_max"]
        if largest == 0:
            raise ValueError(f"{neuron}: it is 0 on all texts measured, so it has no unit to be clamped in")
        return largest

    def token(self, id: int) -> dict[str, Any]:
        """A token as the page is told of it."""
        told: dict[str, Any] = {"id": id, "text": self.vocab.string(id)}
        return told | {"special": True} if id in self.specials else told

    def likeliest(self, log_probs: Tensor, n: int = 8) -> list[dict[str, Any]]:
        """The n likeliest tokens of one position, with their probabilities."""
        best = log_probs.topk(min(n, len(log_probs)))
        return [
            self.token(id) | {"p": p} for id, p in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        ]

    def _make(self) -> None:
        for side in self._order:
            self.decoding = {"side": side, "done": 0, "total": None}
            map = self._maps.get(side)
            if map is None:
                with watching(self._watch):
                    map = flash_decode(self.model, side=side)
            told, blobs = contents.side(map)
            if not self.sides:
                blobs |= {
                    "vocab": contents.vocabulary(map),
                    "meta": pack.json_blob(contents.meta(self.name, map, (), model=self.name)),
                }
            self.data |= blobs
            self.sides.append(told)
            self._maps.pop(side, None)
        self.decoding = None

    def _watch(self, what: str, done: int, total: int | None) -> None:
        self.jobs.idle.wait()
        if self._closed:
            raise Cancelled
        if self.decoding is not None:
            self.decoding = {**self.decoding, "done": done, "total": total}


def _require_own(map: NeuronMap, weights: MLPWeights) -> None:
    """Refuse a map of another model; the lengths of a layer's directions tell, unless a lens has changed them."""
    shape = (map.n_layers, map.d_mlp, map.d_vocab)
    own = (weights.n_layers, weights.d_mlp, weights.d_vocab)
    if map.side not in weights.sides or shape != own or not np.array_equal(map.vocab.names, weights.vocab.names):
        raise ValueError(
            f"maps: expected maps of {weights.name}, layers, d_mlp and d_vocab {own}, got one of {map.source.model}, "
            f'side "{map.side}", {shape}'
        )
    if map.side == "out" and map.source.lens is not None:
        return
    layer = map.layers[0]
    lengths = weights.directions(layer, map.side, fold_ln=map.source.fold_ln).float().norm(dim=1).cpu()
    if not torch.allclose(lengths, map.norm[0], rtol=1e-2):
        raise ValueError(
            f"maps: expected maps of this {weights.name}, got one of {map.source.model} whose layer {layer} has other "
            "weights; decode the model that is served"
        )
