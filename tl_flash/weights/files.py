"""The files of a checkpoint, in a folder or on the hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_OBJECTS = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_BESIDE_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_on_hub(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is named by the hub's name of it, not by its folder.

    Raises:
        TypeError: neither text nor a path.
        FileNotFoundError: no such folder, and no name that the hub could have.
        ValueError: a file.
    """
    if not isinstance(checkpoint, str | Path):
        raise TypeError(f"checkpoint: expected a folder or a name on the hub, got {type(checkpoint).__name__}")
    if os.path.isdir(checkpoint):  # of a name that no file could have, it says no
        return False
    if os.path.isfile(checkpoint):
        raise ValueError(
            f"{checkpoint}: a file; expected a model's folder, give {Path(checkpoint).parent}, or a .gguf file"
        )
    if not (isinstance(checkpoint, str) and _HUB_NAME.fullmatch(checkpoint)):
        raise FileNotFoundError(f"{str(checkpoint)!r}: no such folder")
    try:
        validate_repo_id(checkpoint)
    except HFValidationError as error:
        raise FileNotFoundError(f"{checkpoint!r}: no such folder, and no name that the hub could have") from error
    return True


class Files:
    """The files of a checkpoint; those of a model on the hub are fetched when first asked for."""

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = checkpoint
        self._found: dict[str, Path | None] = {}
        self._unreachable: EntryNotFoundError | None = None
        self._on_hub = is_on_hub(checkpoint)

    def find(self, name: str) -> Path | None:
        """Where a file is, None where the checkpoint has none of that name."""
        if name not in self._found:
            self._found[name] = self._fetch(name) if self._on_hub else self._local(name)
        return self._found[name]

    @property
    def is_out_of_reach(self) -> bool:
        """Whether the hub could not be asked for a file that is not in the cache."""
        return isinstance(self._unreachable, LocalEntryNotFoundError)

    def need(self, name: str, why: str) -> Path:
        """Where a file is.

        Raises:
            FileNotFoundError: the checkpoint has none of that name, or the hub cannot be reached.
        """
        path = self.find(name)
        if path is None:
            raise FileNotFoundError(f"{self.checkpoint}: no {name}; {why}") from self._unreachable
        return path

    def json(self, name: str) -> dict[str, Any]:
        """A file's contents."""
        hint = "expected a Hugging Face model folder" + (", or a name on the hub that can be reached" * self._on_hub)
        path = self.need(name, hint)
        return read_json(path)

    def refuse_adapter(self) -> None:
        """Refuse a folder whose base model an adapter changes.

        Raises:
            ValueError: it holds one; transformers would load both.
        """
        if self.find("adapter_config.json") is not None:
            raise ValueError(
                f"{self.checkpoint}: holds an adapter (adapter_config.json), so its base's weights are not the "
                "model's; merge it, with PEFT's model.merge_and_unload(), and save the result to a folder of its own"
            )

    def tokenizer(self) -> Any:
        """The tokenizer beside the weights; None without one.

        Raises:
            ValueError: a file of it is broken.
        """
        found = [path for name in _TOKENIZERS if (path := self.find(name)) is not None]
        if not found:
            return None
        for name in _BESIDE_TOKENIZERS:
            self.find(name)
        return folder_tokenizer(found[0].parent)

    def identity(self) -> dict[str, Any]:
        """Size and time of every weight file in use."""
        paths = {name: path for name, path in sorted(self._found.items()) if path and name.endswith(".safetensors")}
        stats = {name: path.stat() for name, path in paths.items()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def _local(self, name: str) -> Path | None:
        path = Path(self.checkpoint) / name
        return path if path.is_file() else None

    def _fetch(self, name: str) -> Path | None:
        try:
            path = Path(huggingface_hub.hf_hub_download(str(self.checkpoint), name))
        except EntryNotFoundError as error:  # not there; or the hub is out of reach, which `need` tells
            self._unreachable = error
            return None
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{self.checkpoint}: no such folder, and the hub has no such model, or none that you may read; check "
                "the name, and log in where it is gated or private"
            ) from error
        others = {other.parent for other in self._found.values() if other is not None}
        if others - {path.parent}:
            raise ValueError(
                f"{self.checkpoint}: {name} came from another revision than the files before it, "
                "so the model changed on the hub meanwhile; start again"
            )
        return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: truncated, or no JSON ({error}); fetch it again") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(held).__name__}; fetch it again")
    return held


def folder_tokenizer(folder: str | Path, **options: Any) -> Any:
    """The tokenizer saved in a folder, by transformers 4 or 5; options as AutoTokenizer takes them.

    Raises:
        ValueError: a file of it is broken.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    require_tokenizer(folder)
    kind = PreTrainedTokenizerFast if is_of_unknown_class(folder) else AutoTokenizer
    return kind.from_pretrained(folder, **options)


def require_tokenizer(folder: str | Path) -> None:
    """Refuse a folder whose tokenizer's files are broken; one without a tokenizer will do.

    Raises:
        ValueError: one is no JSON, or tokenizer.json holds no vocabulary.
    """
    for name in _OBJECTS:
        path = Path(folder) / name
        held = read_json(path) if path.is_file() else None
        model = {} if held is None else held.get("model")
        if name == "tokenizer.json" and held is not None and not (isinstance(model, dict) and model.get("vocab")):
            raise ValueError(f"{path}: holds no vocabulary (model.vocab); fetch it again")


def is_of_unknown_class(folder: str | Path) -> bool:
    """Whether transformers 5 saved the tokenizer by its name for any that is all in tokenizer.json, and this is 4."""
    import transformers

    config = Path(folder) / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.is_file() else None
    return named == "TokenizersBackend" and not hasattr(transformers, named)
