"""Checkpoints in safetensors, one file or shards: tensors are mapped, none is read before its numbers are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_flash.weights.files import Files

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Shards:
    """Which file holds which tensor."""

    def __init__(self, files: Files) -> None:
        self._files, self.checkpoint = files, files.checkpoint

    @cached_property
    def where(self) -> dict[str, str]:
        """The file of every tensor."""
        if self._files.find(INDEX) is not None:
            return _weight_map(self._files)
        if self._files.find(SINGLE) is None and any(self._files.find(name) for name in _PICKLES):
            folder = self._files.checkpoint
            raise ValueError(
                f"{folder}: holds pytorch_model.bin alone, a pickle, which could run any code; expected safetensors. "
                f"If you trust it, convert it: python -c 'from transformers import AutoModelForCausalLM as M; "
                f'M.from_pretrained("{folder}", dtype="auto").save_pretrained("converted")\''
            )
        with self.open(SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)

    def open(self, name: str) -> Any:
        """A safetensors file, mapped.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is truncated, or something else.
        """
        path = self._files.need(name, "expected every safetensors file of the checkpoint; fetch it again")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated, or no safetensors file ({error}); fetch it again") from error

    def opened(self) -> Opened:
        """The tensors, each file opened at most once; their memory is given back with the last tensor."""
        return Opened(self)

    def quantisation(self, names: Iterable[str]) -> str | None:
        """How these are quantised; None: not at all."""
        return None


def _weight_map(files: Files) -> dict[str, str]:
    where = files.json(INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(
            f"{files.checkpoint}: {INDEX} has no weight_map of tensors to files, expected one; fetch it again"
        )
    return where


class Opened(Mapping[str, Tensor]):
    """Tensors by name, each mapped from its file: none is read before its numbers are used."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._handles: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._get(name, lambda handle: handle.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards.where)

    def __len__(self) -> int:
        return len(self._shards.where)

    def __contains__(self, name: object) -> bool:
        return name in self._shards.where

    def require(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse tensors that are missing or of another shape, by the headers alone.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a tensor is missing, or of another shape than config.json gives it.
        """
        for name, shape in shapes.items():
            given = tuple(self._get(name, lambda handle, name=name: handle.get_slice(name).get_shape()))
            if given != shape:
                file = self._shards.where[name]
                raise ValueError(
                    f"{file}: {name} is {given}, expected {shape} by config.json; "
                    "check that both are of one model, and fetch them again"
                )

    def _get(self, name: str, get: Callable[[Any], Any]) -> Any:
        if name not in self:
            raise ValueError(f"{self._shards.checkpoint}: no tensor {name}; expected a whole causal language model")
        file = self._shards.where[name]
        if file not in self._handles:
            self._handles[file] = self._shards.open(file)
        try:
            return get(self._handles[file])
        except SafetensorError as error:
            raise ValueError(f"{file}: no tensor {name} ({error}), which {INDEX} expects there") from error
