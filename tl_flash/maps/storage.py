"""Maps on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tl_flash.artefacts import read, write
from tl_flash.maps.null import Null
from tl_flash.maps.origin import Source
from tl_flash.maps.readings import Readings, Tracked
from tl_flash.maps.top_tokens import TopTokens, tau_of
from tl_flash.vocab import Vocab

FORMAT = "tl_flash.NeuronMap"
VERSION = 2
"""A file is of version 1, which older readers take, unless they would misread it: see `_version`."""
_POLE = ("ids", "logits", "log_z", "write_z")
_STATISTICS = ("norm", "mean", "std", "kurtosis")

R = TypeVar("R", bound=Readings)


def save(map: Readings, path: str | Path) -> None:
    """Write a map; see `NeuronMap.save`."""
    header = {
        "side": map.side,
        "score": map.score,
        "n_layers": map.n_layers,
        "layers": list(map.layers),
        "n_experts": map.n_experts,
        "d_model": map.d_model,
        "d_vocab": map.d_vocab,
        "tracked": map.tracked.ids,
        "source": asdict(map.source),
    }
    write(FORMAT, _version(map), header, _tensors(map), path)


def _version(map: Readings) -> int:
    """2 with zero directions, whose ids are -1, or without a final norm, where tau is 1."""
    return 2 if bool(map.zero.any()) or not map.source.final_norm else 1


def load(kind: type[R], path: str | Path) -> R:
    """Read a map; see `NeuronMap.load`."""
    header, tensors = read(FORMAT, VERSION, path)
    vocab = Vocab(header["d_vocab"], _unpack_strings(tensors["vocab.bytes"], tensors["vocab.lengths"]))
    source = Source(**header["source"])
    tau = tau_of(tensors["norm"], header["d_model"], final_norm=source.final_norm)
    poles = [
        TopTokens(
            *(tensors[f"{pole}.{name}"] for name in _POLE),
            std=tensors["std"],
            tau=tau,
            vocab=vocab,
            score=header["score"],
        )
        for pole in ("positive", "negative")
    ]
    return kind(
        side=header["side"],
        score=header["score"],
        n_layers=header["n_layers"],
        layers=tuple(header["layers"]),
        n_experts=header["n_experts"],
        d_model=header["d_model"],
        source=source,
        vocab=vocab,
        positive=poles[0],
        negative=poles[1],
        null=Null(tensors["null.z"], tensors["null.kurtosis"]) if "null.z" in tensors else None,
        tracked=Tracked(header["tracked"], tensors["tracked"], vocab),
        **{name: tensors[name] for name in _STATISTICS},
    )


def _tensors(map: Readings) -> dict[str, Tensor]:
    tensors = {name: getattr(map, name) for name in _STATISTICS}
    for pole in ("positive", "negative"):
        tensors |= {f"{pole}.{name}": getattr(getattr(map, pole), name) for name in _POLE}
    if map.null is not None:
        tensors |= {"null.z": map.null.z, "null.kurtosis": map.null.kurtosis}
    tensors["tracked"] = map.tracked.logits
    tensors["vocab.bytes"], tensors["vocab.lengths"] = _pack_strings(map.vocab.strings)
    return tensors


def _pack_strings(strings: tuple[str | None, ...]) -> tuple[Tensor, Tensor]:
    """All strings as UTF-8 behind one another, and the length of each in bytes, -1 for none."""
    encoded = [None if string is None else string.encode() for string in strings]
    lengths = [-1 if text is None else len(text) for text in encoded]
    joined = np.frombuffer(b"".join(text or b"" for text in encoded), dtype=np.uint8).copy()
    return torch.from_numpy(joined), torch.tensor(lengths, dtype=torch.int32)


def _unpack_strings(joined: Tensor, lengths: Tensor) -> tuple[str | None, ...]:
    text, strings, start = joined.numpy().tobytes(), [], 0
    for length in lengths.tolist():
        strings.append(None if length < 0 else text[start : start + length].decode())
        start += max(length, 0)
    return tuple(strings)
