"""Which .gguf files a checkpoint is: one that is named, the only one in a folder or on the hub, or the parts of one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from tl_flash.weights.files import Files, is_on_hub
from tl_flash.weights.formats.safetensors import INDEX, SINGLE

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def files_of(checkpoint: str | Path) -> tuple[Path, ...] | Files:
    """The files of a checkpoint in GGUF, the parts of a split one in order; those of one in another format as `Files`.

    Args:
        checkpoint: a .gguf file, a folder that holds one and no safetensors, a name on the hub that holds one and no
            config.json, or on the hub "owner/name/file.gguf".

    Raises:
        TypeError: neither text nor a path.
        FileNotFoundError: no such file or model, or a part is missing.
        ValueError: several .gguf files, so that one has to be named.
    """
    name = str(checkpoint)
    if isinstance(checkpoint, str | Path) and name.endswith(".gguf") and not os.path.isdir(name):
        return _named(name)
    files = Files(checkpoint)
    if os.path.isdir(checkpoint):
        folder = Path(checkpoint)
        if any((folder / own).is_file() for own in (INDEX, SINGLE)):
            return files
        only = _only(name, (path.name for path in folder.glob("*.gguf")))
        return files if only is None else tuple(folder / part for part in _parts(only))
    if files.find("config.json") is not None or files.is_out_of_reach:
        return files
    only = _only(name, (own for own in huggingface_hub.list_repo_files(name) if own.endswith(".gguf")))
    return files if only is None else tuple(_fetched(name, part) for part in _parts(only))


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


def _fetched(model: str, name: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(model, name))
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"{model}/{name}: the hub has no such file, or cannot be reached") from error
