"""HookedTransformer, TransformerBridge and Hugging Face models to MLPWeights, and a refusal of all others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tl_flash.vocab import Vocab
from tl_flash.weights.found import Found, found
from tl_flash.weights.hooked import read_transformer_lens
from tl_flash.weights.layouts import Layout
from tl_flash.weights.mlp import MLPWeights
from tl_flash.weights.reading import weights_of


def read_model(model: Any, *, tokenizer: Any = None) -> MLPWeights:
    """Find a model's MLP weights.

    Args:
        model: a HookedTransformer or subclass, a TransformerBridge, or a Hugging Face causal LM; recognised by what it
            has, so that TransformerLens need not be imported.
        tokenizer: names the tokens; by default the model's own.

    Raises:
        TypeError: it is none of these.
        ValueError: its neurons cannot be read faithfully; the message says why.
    """
    if all(hasattr(model, name) for name in ("cfg", "blocks", "W_U")):
        return read_transformer_lens(model, tokenizer)
    if hasattr(model, "original_model"):
        raise ValueError(
            f"model: expected a {type(model).__name__} with blocks and W_U, got one without (an encoder-decoder?); "
            "give the Hugging Face model that it was made of, or its folder"
        )
    if hasattr(model, "config") and hasattr(model, "get_parameter"):
        return _read_hugging_face(model, tokenizer)
    raise TypeError(
        "model: expected a HookedTransformer, a TransformerBridge, a Hugging Face causal LM or a checkpoint folder, "
        f"got {type(model).__name__}"
    )


def model_layout(model: Any) -> Layout:
    """The layout of a Hugging Face model in memory, or of the one within a bridge.

    Raises:
        TypeError: it is neither.
        ValueError: as `read_model`.
    """
    within = getattr(model, "original_model", model)
    if not hasattr(within, "config") or not hasattr(within, "get_parameter"):
        raise TypeError(
            f"model: expected a Hugging Face causal LM, a bridge of one or a checkpoint, got {type(model).__name__}"
        )
    return _found_of(within).layout if within is model else found(type(within), within.config).layout


def _found_of(model: nn.Module) -> Found:
    seen = found(type(model), model.config, model)
    _require_plain(model, seen)
    return seen


def _require_plain(model: nn.Module, seen: Found) -> None:
    """Refuse a model some of whose modules are no longer those that its class is made of.

    An adapter, a mask or a parametrisation makes a module apply another matrix than its weight.
    """
    layout = seen.layout
    names = [f"{layout.prefix(at)}{name}" for at in layout.readable for name in layout.layers[at].names]
    final = [] if layout.final is None or layout.final.weight is None else [layout.final.weight]
    for name in [*names, *final, layout.unembedding.tensor]:
        path = name.rpartition(".")[0]
        plain = type(seen.tiny.get_submodule(path))
        try:
            given = type(model.get_submodule(path))
            model.get_parameter(name)
        except AttributeError as error:
            raise ValueError(_changed(path, plain.__name__, str(error))) from error
        if given is not plain:
            raise ValueError(_changed(path, plain.__name__, given.__name__))


def _changed(path: str, expected: str, given: str) -> str:
    return (
        f"model: {path} was changed: expected {expected}, got {given}; so its weight is not what it applies. Merge "
        "adapters first (peft's merge_and_unload()), and make masks and parametrisations permanent"
    )


def _read_hugging_face(model: Any, tokenizer: Any) -> MLPWeights:
    layout = _found_of(model).layout
    tensors = {key: tensor.detach() for key, tensor in model.named_parameters(remove_duplicate=False)}
    W_U = layout.unembedding.rows(_floating(tensors[layout.unembedding.tensor], "W_U")).T
    return weights_of(
        layout,
        lambda: tensors,
        W_U=W_U,
        vocab=Vocab.of_tokenizer(tokenizer, W_U.shape[1]),
        name=getattr(model.config, "name_or_path", "") or "unnamed",
        class_name=type(model).__name__,
    )


def _floating(tensor: Tensor, what: str) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{what}: expected floating-point weights, got {tensor.dtype} (quantised?)")
    return tensor
