"""A checkpoint folder, or a model on the Hugging Face hub, to MLPWeights: tensors are mapped, no model is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_flash.vocab import Vocab
from tl_flash.weights.files import Files
from tl_flash.weights.formats.safetensors import Opened, Shards
from tl_flash.weights.layouts import Architecture, Sizes, architecture
from tl_flash.weights.mlp import MLPWeights


def read_checkpoint(checkpoint: str | Path, *, tokenizer: Any = None) -> MLPWeights:
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
    files.refuse_adapter()
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
