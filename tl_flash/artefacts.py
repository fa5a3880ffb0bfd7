"""Results on disk: one safetensors file each, versioned, checksummed, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def require_place(path: str | Path, what: str) -> None:
    """Refuse a path that nothing can be written to, before the work for it is done.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {what} to")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder; expected the name of a file to write {what} to")


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
    if path.is_dir():
        raise FileNotFoundError(f"{path}: a folder; expected a file that .save wrote, or decode this folder first")
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


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data.cast("B") if tensor.numel() else b"")
    return digest.hexdigest()
