"""A checkpoint folder, or a model on the Hugging Face hub, to MLPWeights: tensors are mapped, none is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from tl_flash.vocab import Vocab
from tl_flash.weights.files import Files
from tl_flash.weights.formats.dequantised import Dequantised, QuantisedShards, tensors_of
from tl_flash.weights.formats.gguf import GGUFTensors, opened_gguf
from tl_flash.weights.formats.safetensors import Opened, Shards
from tl_flash.weights.found import Found, found
from tl_flash.weights.gguf_files import files_of
from tl_flash.weights.layouts import Layout, Size
from tl_flash.weights.llama_cpp import EMBEDDING, config_of, gguf_layout, gguf_tokenizer
from tl_flash.weights.mlp import MLPWeights, UnembeddingWeights
from tl_flash.weights.reading import require_readable_layers, unembedding_of, weights_of

_UNEMBEDDINGS = ("lm_head.weight", "embed_out.weight")
"""What published checkpoints call the unembedding where they do not call it as `save_pretrained` does."""


def read_checkpoint(checkpoint: str | Path, *, tokenizer: Any = None) -> MLPWeights:
    """Find the MLP weights of a checkpoint, without reading more of it than its headers and the unembedding.

    Args:
        checkpoint: a Hugging Face folder of config.json and safetensors, in one file or in shards, float32, float16,
            bfloat16 or quantised in a way that config.json names; a .gguf file, or a folder with one; or a name on the
            hub, such as "meta-llama/Llama-3.1-8B", of which the files that are needed are fetched into
            huggingface_hub's cache, or "owner/name/file.gguf".
        tokenizer: names the tokens; by default the checkpoint's own, if it has one.

    Raises:
        FileNotFoundError: no such folder or model, or a file of it is missing.
        ValueError: a class that transformers lacks or whose neurons cannot be read, a config that does not fit, a
            missing or misshapen tensor, a truncated file, an unknown quantisation, pickled weights.
    """
    held = held_by(checkpoint)
    held.require_layers(held.layout.readable[:1])
    return weights_of(
        held.layout,
        held.opened,
        **held.output(tokenizer),
        on_disk=True,
        require_layers=held.require_layers,
        identity=held.identity,
        stored=held.stored(),
    )


def read_checkpoint_unembedding(checkpoint: str | Path, *, tokenizer: Any = None) -> UnembeddingWeights:
    """Find the unembedding of a checkpoint and the norm before it, whatever its layers are; see `read_checkpoint`."""
    held = held_by(checkpoint)
    return unembedding_of(held.layout, held.opened(), **held.output(tokenizer))


def checkpoint_layout(checkpoint: str | Path) -> Layout:
    """The layout of a checkpoint, by its config alone.

    Raises:
        FileNotFoundError: no such folder or model.
        ValueError: a class that transformers lacks, or whose models' neurons cannot be read.
    """
    files = files_of(checkpoint)
    if isinstance(files, Files):
        return _found_of(files).saved
    seen, tensors, arch = _found_of_gguf(str(checkpoint), files)
    return gguf_layout(seen, tensors, arch)


@dataclass(frozen=True)
class Held:
    """A checkpoint whose unembedding and final norm are there."""

    name: str
    layout: Layout
    """By the names that its tensors have."""
    d_model: int
    sizes: Callable[[int], list[Size]]
    """Of the neurons of a layer."""
    opened: Callable[[], Opened | Dequantised | GGUFTensors]
    tokenizer: Callable[[], Any]
    identity: Callable[[], dict[str, Any]]
    stored: Callable[[], str | None]
    """How its matrices are quantised."""

    def require_layers(self, layers: Sequence[int]) -> None:
        """Refuse layers whose tensors are missing or of another shape than config or header give them."""
        require_readable_layers(self.layout, layers)
        opened = self.opened()
        for layer in layers:
            shapes = self.layout.layers[layer].shapes(self.layout.prefix(layer), self.sizes(layer), self.d_model)
            opened.require(shapes)

    def output(self, tokenizer: Any) -> dict[str, Any]:
        """The unembedding and what its tokens are called, by the names of `UnembeddingWeights`."""
        place = self.layout.unembedding
        W_U = place.rows(self.opened()[place.tensor].clone()).T
        return {
            "W_U": W_U,
            "vocab": Vocab.of_tokenizer(self.tokenizer() if tokenizer is None else tokenizer, W_U.shape[1]),
            "name": self.name,
            "class_name": self.layout.class_name,
        }


def held_by(checkpoint: str | Path) -> Held:
    """A checkpoint in whatever format; see `read_checkpoint`."""
    files = files_of(checkpoint)
    return _in_safetensors(files) if isinstance(files, Files) else _in_gguf(str(checkpoint), files)


def _in_safetensors(files: Files) -> Held:
    files.refuse_adapter()
    shards, seen = tensors_of(files), _found_of(files)
    layout = _named_as(shards, seen)
    shape = seen.shapes[seen.layout.unembedding.tensor]
    d_model = shape[0] if layout.unembedding.transposed else shape[1]
    opened = shards.opened()
    layout = replace(layout, unembedding=replace(layout.unembedding, tensor=_unembedding(layout, opened)))
    opened.require({layout.unembedding.tensor: shape} | _final(layout, d_model))

    def sizes(layer: int) -> list[Size]:
        prefix = seen.layout.prefix(layer)
        return [neurons.size(seen.shapes, prefix) for neurons in seen.layout.layers[layer].neurons]

    return Held(
        str(files.checkpoint),
        layout,
        d_model,
        sizes,
        shards.opened,
        files.tokenizer,
        files.identity,
        stored=lambda: shards.quantisation([layout.unembedding.tensor, *matrices(layout)]),
    )


def _in_gguf(name: str, paths: Sequence[Path]) -> Held:
    seen, tensors, arch = _found_of_gguf(name, paths)
    layout = gguf_layout(seen, tensors, arch)
    d_vocab, d_model = tensors.info(EMBEDDING).shape
    for matrix in matrices(layout):
        if matrix in tensors:
            tensors.info(matrix)
    tensors.require({layout.unembedding.tensor: (d_vocab, d_model)} | _final(layout, d_model))
    stats = {path.name: path.stat() for path in paths}

    def sizes(layer: int) -> list[Size]:
        prefix, places = layout.prefix(layer), layout.layers[layer].neurons
        shapes = {prefix + one.down.tensor: tensors.info(prefix + one.down.tensor).shape for one in places}
        return [one.size(shapes, prefix) for one in places]

    return Held(
        name,
        layout,
        d_model,
        sizes,
        opened=lambda: tensors,
        tokenizer=lambda: gguf_tokenizer(paths[0]),
        identity=lambda: {part: [stat.st_size, stat.st_mtime_ns] for part, stat in stats.items()},
        stored=lambda: tensors.quantisation([layout.unembedding.tensor, *matrices(layout)]),
    )


def matrices(layout: Layout) -> list[str]:
    """The names of the tensors that hold a model's neurons, the first expert's for all where each has its own."""
    return [
        layout.prefix(at) + place.tensor.format(0)
        for at, layer in enumerate(layout.layers)
        for neurons in layer.neurons
        for place in neurons.places.values()
    ]


def _final(layout: Layout, d_model: int) -> dict[str, tuple[int, ...]]:
    """The final norm's tensor and its shape, where it has one."""
    named = layout.final is not None and layout.final.weight is not None
    return {layout.final.weight: (d_model,)} if named else {}  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]


def _found_of_gguf(name: str, paths: Sequence[Path]) -> tuple[Found, GGUFTensors, str]:
    """What is known of the class of a model in GGUF, its tensors, and what llama.cpp calls the class."""
    header, tensors = opened_gguf(name, paths)
    model_class, config = config_of(header, tensors, tensors.info(EMBEDDING).shape[0])
    return found(model_class, config), tensors, header.fields["general.architecture"]


def _found_of(files: Files) -> Found:
    """What is known of the class that a checkpoint's config names; see `class_of_checkpoint`."""
    return found(*class_of_checkpoint(files))


def class_of_checkpoint(files: Files) -> tuple[Any, Any]:
    """The class that a checkpoint's config names, and the config, without what it says of a quantisation.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: transformers has no such class, or the config is not one of it.
    """
    import transformers

    given = files.json("config.json").get("architectures")
    name = given[0] if isinstance(given, list) and given else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if model_class is None or not hasattr(model_class, "config_class"):
        raise ValueError(
            f"config.json: expected architectures to list a class of transformers {transformers.__version__}, got "
            f"{given!r}; load the model with the code that it came with, and decode the model instead of its folder"
        )
    try:
        parsed = model_class.config_class.from_pretrained(files.need("config.json", "expected it").parent)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"config.json: no config of {name} ({error}); fetch it again") from error
    parsed.__dict__.pop("quantization_config", None)
    return model_class, parsed


def _named_as(shards: Shards | QuantisedShards, seen: Found) -> Layout:
    """The layout by the names of these tensors: those of a save, or of parameters, under whatever root."""
    for layout in (seen.saved, seen.layout):
        moved = _moved(layout, shards.where)
        if moved is not None:
            return moved
    return seen.saved  # whose first missing tensor will be named


def _moved(layout: Layout, names: Sequence[str] | dict[str, str]) -> Layout | None:
    """The layout under the root that these names have; None where they have no tensor of its."""
    if not layout.readable:
        return layout
    first = layout.readable[0]
    inner = layout.root.removesuffix(".").rpartition(".")[2]
    tail = f"{inner}.{first}.{layout.layers[first].neurons[-1].down.tensor.format(0)}"
    roots = [name.removesuffix(tail) for name in names if f".{name}".endswith(f".{tail}")]
    own = layout.root.removesuffix(f"{inner}.")
    if own in roots:
        return layout
    if len(roots) > 1:
        raise ValueError(f"tensors ending in {tail} are under {roots}; expected one stack of layers of that kind")
    if not roots:
        return None
    final = layout.final
    if final is not None and final.weight is not None:
        final = replace(final, weight=roots[0] + final.weight.removeprefix(own))
    names = [
        roots[0] + name.removeprefix(own) if name.startswith(own) else name
        for name in (layout.unembedding.tensor, *layout.shared_with)
    ]
    return replace(
        layout,
        root=f"{roots[0]}{inner}.",
        final=final,
        unembedding=replace(layout.unembedding, tensor=names[0]),
        shared_with=tuple(names[1:]),
    )


def _unembedding(layout: Layout, tensors: Opened | Dequantised) -> str:
    """The name under which the unembedding is kept.

    Raises:
        ValueError: it is there twice with other numbers, though the config ties the two.
    """
    own = layout.unembedding.tensor
    names = [name for name in (own, *layout.shared_with) if name in tensors]
    twice = next((name for name in names[1:] if not torch.equal(tensors[name], tensors[names[0]])), None)
    if twice is not None:
        first, second = sorted((names[0], twice))
        raise ValueError(
            f"{first} and {second} differ, yet the config ties them (tie_word_embeddings); expected one unembedding: "
            "set tie_word_embeddings to false in config.json if the model was trained with two"
        )
    ends = [name for name in tensors if f".{name}".endswith(tuple(f".{end}" for end in _UNEMBEDDINGS))]
    return names[0] if names else (ends[0] if len(ends) == 1 else own)
