"""A checkpoint folder, or a model on the Hugging Face hub, to MLPWeights: tensors are mapped, no model is built."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_flash.architectures import Architecture, Sizes, architecture
from tl_flash.vocab import Vocab
from tl_flash.weights import MLPWeights

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BESIDE_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read(checkpoint: str | Path, *, tokenizer: Any = None) -> MLPWeights:
    """Find the MLP weights of a checkpoint, without reading more of it than its headers and the unembedding.

    Args:
        checkpoint: a Hugging Face folder of config.json and safetensors, in one file or in shards, float32, float16 or
            bfloat16; or a name on the hub, such as "meta-llama/Llama-3.1-8B", of which the shards that are needed are
            fetched into huggingface_hub's cache.
        tokenizer: names the tokens; by default the checkpoint's own, if it has one.

    Raises:
        FileNotFoundError: no such folder or model, or a file of it is missing.
        ValueError: an architecture that is not known (the message lists those that are), a config without sizes, a
            missing or misshapen tensor, a truncated file, quantised or pickled weights.
    """
    files = Files(checkpoint)
    config = files.json("config.json")
    if config.get("quantization_config"):
        raise ValueError(f"{checkpoint}: quantised, so its tensors are no weights; expected the unquantised model")
    class_name = next(iter(config.get("architectures") or []), "(none named in config.json)")
    row = architecture(class_name)
    shards = Shards(files)
    names = row.found_in(shards.where)
    text = config | config.get("text_config", {})
    n_layers, d_vocab, sizes = _n_layers(text), _d_vocab(text, row), _sizes(text, row)
    opened = shards.opened()
    W_U = _unembedding(names, opened, text, (d_vocab, sizes.d_model)).T
    opened.require({names.roots[0] + names.final: (sizes.d_model,)})

    def require_layers(layers: Sequence[int]) -> None:
        opened = shards.opened()
        for layer in layers:
            opened.require(names.shapes(layer, shards.where, sizes))

    require_layers([0])
    return MLPWeights(
        n_layers=n_layers,
        d_mlp=names.read_layer(0, shards.opened()).d_mlp,
        d_model=sizes.d_model,
        centre=names.centre,
        W_U=W_U,
        final_gain=names.final_gain(opened),
        read_layer=lambda layer: names.read_layer(layer, shards.opened()),
        sides=("in", "gate", "out") if names.gated else ("in", "out"),
        vocab=Vocab.of_tokenizer(files.tokenizer() if tokenizer is None else tokenizer, d_vocab),
        name=str(checkpoint),
        class_name=class_name,
        on_disk=True,
        require_layers=require_layers,
        identity=files.identity,
    )


class Files:
    """The files of a checkpoint; those of a model on the hub are fetched when first asked for."""

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = checkpoint
        self._found: dict[str, Path | None] = {}
        self._unreachable: EntryNotFoundError | None = None
        self._on_hub = not Path(checkpoint).is_dir()
        if self._on_hub and not (isinstance(checkpoint, str) and _HUB_NAME.fullmatch(checkpoint)):
            raise FileNotFoundError(f"{checkpoint}: no such folder")

    def find(self, name: str) -> Path | None:
        """Where a file is, None where the checkpoint has none of that name."""
        if name not in self._found:
            self._found[name] = self._fetch(name) if self._on_hub else self._local(name)
        return self._found[name]

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
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: truncated, or no JSON ({error}); fetch it again") from error

    def tokenizer(self) -> Any:
        """The tokenizer beside the weights; None without one."""
        found = [path for name in _TOKENIZERS if (path := self.find(name)) is not None]
        if not found:
            return None
        for name in _BESIDE_TOKENIZERS:
            self.find(name)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(found[0].parent)

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
        others = {other.parent for other in self._found.values() if other is not None}
        if others - {path.parent}:
            raise ValueError(
                f"{self.checkpoint}: {name} came from another revision than the files before it, "
                "so the model changed on the hub meanwhile; start again"
            )
        return path


class Shards:
    """Which file holds which tensor."""

    def __init__(self, files: Files) -> None:
        self._files, self.checkpoint = files, files.checkpoint

    @cached_property
    def where(self) -> dict[str, str]:
        """The file of every tensor."""
        if self._files.find(INDEX) is not None:
            return self._files.json(INDEX)["weight_map"]
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


def _unembedding(names: Architecture, tensors: Opened, config: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    """The unembedding [d_vocab, d_model], read into memory."""
    own = next((name for name in names.unembeddings if name in tensors), names.unembeddings[0])
    embedding = names.roots[0] + names.embedding
    said = config.get("tie_word_embeddings")
    tied = names.tied if said is None else said
    if tied and own in tensors and not torch.equal(tensors[own], tensors[embedding]):
        raise ValueError(
            f"{own} and {embedding} differ, yet the config ties them (tie_word_embeddings); expected one unembedding: "
            "set tie_word_embeddings to false in config.json if the model was trained with two"
        )
    name = embedding if tied else own
    tensors.require({name: shape})
    return tensors[name].clone()


def _n_layers(config: dict[str, Any]) -> int:
    return _number(config, "num_hidden_layers", "n_layer")


def _d_vocab(config: dict[str, Any], names: Architecture) -> int:
    return names.d_vocab if names.d_vocab and "vocab_size" not in config else _number(config, "vocab_size")


def _sizes(config: dict[str, Any], names: Architecture) -> Sizes:
    d_model = _number(config, "hidden_size", "n_embd")
    if config.get("n_inner", 0) is None or ("n_embd" in config and "n_inner" not in config):
        d_mlp = 4 * d_model  # GPT-2's default
    else:
        d_mlp = _number(config, "intermediate_size", "n_inner")
    if names.experts is None:
        return Sizes(d_model, d_mlp)
    n_experts = _number(config, "num_local_experts", "num_experts")
    return Sizes(d_model, d_mlp, d_expert=_number(config, names.experts.width), n_experts=n_experts)


def _number(config: dict[str, Any], *keys: str) -> int:
    """The first of these that a config gives.

    Raises:
        ValueError: it gives none, or no positive whole number.
    """
    given = next((config[key] for key in keys if config.get(key) is not None), None)
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"config.json: expected {' or '.join(keys)}, a positive whole number, got {given!r}")
    return given
