"""Results on disk: one safetensors file each, versioned, checksummed, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_flash.neuron_map import NeuronMap, Source, Tracked
from tl_flash.null import Null
from tl_flash.top_tokens import TopTokens
from tl_flash.vocab import Vocab

FORMAT = "tl_flash.NeuronMap"
VERSION = 1
_POLE = ("ids", "logits", "log_z", "write_z")
_STATISTICS = ("norm", "mean", "std", "kurtosis")


def save(map: NeuronMap, path: str | Path) -> None:
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
    write(FORMAT, VERSION, header, _tensors(map), path)


def load(path: str | Path) -> NeuronMap:
    """Read a map; see `NeuronMap.load`."""
    header, tensors = read(FORMAT, VERSION, path)
    vocab = Vocab(header["d_vocab"], _unpack_strings(tensors["vocab.bytes"], tensors["vocab.lengths"]))
    tau = header["d_model"] ** 0.5 / tensors["norm"]
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
    return NeuronMap(
        side=header["side"],
        score=header["score"],
        n_layers=header["n_layers"],
        layers=tuple(header["layers"]),
        n_experts=header["n_experts"],
        d_model=header["d_model"],
        source=Source(**header["source"]),
        vocab=vocab,
        positive=poles[0],
        negative=poles[1],
        null=Null(tensors["null.z"], tensors["null.kurtosis"]) if "null.z" in tensors else None,
        tracked=Tracked(header["tracked"], tensors["tracked"], vocab),
        **{name: tensors[name] for name in _STATISTICS},
    )


def write(format: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write an artefact beside `path`, flush it to the disk, and only then give it its name.

    A crash on the way leaves an older file at `path` as it was.

    Raises:
        OSError: it cannot be written, for want of space for one.
    """
    path = Path(path)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = header | {"version": version}
    header["checksum"] = _checksum(header, tensors)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it; safetensors writes files that only their owner may read
        try:
            save_file(tensors, partial, {format: json.dumps(header, sort_keys=True)})
        except SafetensorError as error:  # which it raises where the disk is full, too
            raise OSError(f"{path}: could not be written ({error})") from error
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(format: str, version: int, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and tensors of an artefact.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated, altered, foreign, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if format not in metadata:
                raise ValueError(f"{path}: a safetensors file, but no {format}; expected one that .save wrote")
            header = json.loads(metadata[format])
            if header["version"] > version:
                raise ValueError(
                    f"{path}: of format {header['version']}, newer than this tl_flash reads ({version}); upgrade it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or no safetensors file ({error}); make it again") from error
    if header.pop("checksum", None) != _checksum(header, tensors):
        raise ValueError(f"{path}: the contents do not match their checksum, so the file was altered; make it again")
    return header, tensors


def _tensors(map: NeuronMap) -> dict[str, Tensor]:
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


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data.cast("B") if tensor.numel() else b"")
    return digest.hexdigest()
