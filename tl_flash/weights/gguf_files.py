"""Which .gguf files a checkpoint is: one that is named, the only one in a folder or on the hub, or the parts of one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from tl_flash.weights.files import Files, is_on_hub
from tl_flash.weights.formats.safetensors import INDEX, SINGLE

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def gguf_files(checkpoint: str | Path) -> tuple[Path, ...] | None:
    """The files of a checkpoint in GGUF, the parts of a split one in order; None where it is in another format.

    Args:
        checkpoint: a .gguf file, a folder or a name on the hub that hold one and no safetensors, or on the hub
            "owner/name/file.gguf".

    Raises:
        TypeError: neither text nor a path.
        FileNotFoundError: no such file or model, or a part is missing.
        ValueError: several .gguf files, so that one has to be named.
    """
    if not isinstance(checkpoint, str | Path):
        return None
    name = str(checkpoint)
    if name.endswith(".gguf"):
        return _named(name)
    if os.path.isdir(checkpoint):
        folder = Path(checkpoint)
        if any((folder / own).is_file() for own in (INDEX, SINGLE)):
            return None
        only = _only(name, (path.name for path in folder.glob("*.gguf")))
        return None if only is None else tuple(folder / part for part in _parts(only))
    if not os.path.isfile(checkpoint) and is_on_hub(checkpoint):
        files = Files(checkpoint)
        if any(files.find(own) is not None for own in (INDEX, SINGLE)):
            return None
        only = _only(name, _listed(name))
        return None if only is None else tuple(_fetched(name, part) for part in _parts(only))
    return None


def _named(name: str) -> tuple[Path, ...]:
    if os.path.isfile(name):
        found = tuple(Path(name).with_name(part) for part in _parts(Path(name).name))
        for path in found:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file, in which {name} goes on; expected all parts together")
        return found
    owner, _, file = name.partition("/")
    model, _, file = file.partition("/")
    if not file or not is_on_hub(f"{owner}/{model}"):
        raise FileNotFoundError(f"{name!r}: no such file")
    folder = file[: -len(Path(file).name)]
    return tuple(_fetched(f"{owner}/{model}", folder + part) for part in _parts(Path(file).name))


def _parts(name: str) -> list[str]:
    """The names of all parts of a split file; of a whole one, its own."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    stem, _, count = match.groups()
    return [f"{stem}-{part:05}-of-{count}.gguf" for part in range(1, int(count) + 1)]


def _only(checkpoint: str, names: Iterable[str]) -> str | None:
    """The one file, or the first part of it, that there is; vision towers (mmproj) are no language models."""
    firsts = sorted({_parts(Path(name).name)[0]: name for name in sorted(names, reverse=True)}.values())
    models = [name for name in firsts if "mmproj" not in name]
    if len(models) > 1:
        listed = ", ".join(f"{checkpoint.rstrip('/')}/{name}" for name in models)
        raise ValueError(f"{checkpoint}: {len(models)} models in GGUF, expected one; give one of {listed}")
    return models[0] if models else None


def _listed(model: str) -> list[str]:
    try:
        return [name for name in huggingface_hub.list_repo_files(model) if name.endswith(".gguf")]
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError):  # what is wrong, the next file asked for tells
        return []


def _fetched(model: str, name: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(model, name))
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"{model}/{name}: the hub has no such file, or cannot be reached") from error
