"""Models in memory to MLPWeights: Hugging Face's by their layout, TransformerLens's by its names, no others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tl_flash.vocab import Vocab
from tl_flash.weights.found import class_of, found_of
from tl_flash.weights.hooked import read_transformer_lens, transformer_lens_unembedding
from tl_flash.weights.layouts import Layout
from tl_flash.weights.mlp import MLPWeights, UnembeddingWeights
from tl_flash.weights.norms import traced_final_norm
from tl_flash.weights.probes import HeldTensors, require_linear
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
    model = _uncompiled(model)
    if _is_transformer_lens(model):
        return read_transformer_lens(model, tokenizer)
    if hasattr(model, "original_model"):
        raise ValueError(
            f"model: expected a {type(model).__name__} with blocks and W_U, got one without (an encoder-decoder?); "
            "give the Hugging Face model that it was made of, or its folder"
        )
    if _is_hugging_face(model):
        return _read_hugging_face(model, tokenizer)
    raise _no_model(model)


def read_model_unembedding(model: Any, *, tokenizer: Any = None) -> UnembeddingWeights:
    """Find a model's unembedding and the norm before it, whatever its MLPs are; see `read_model`."""
    model = _uncompiled(model)
    if _is_transformer_lens(model):
        return transformer_lens_unembedding(model, tokenizer)
    if _is_hugging_face(model):
        return _hugging_face_unembedding(model, tokenizer)
    raise _no_model(model)


def model_layout(model: Any) -> Layout:
    """The layout of a Hugging Face model in memory, or of the one within a bridge.

    Raises:
        TypeError: it is neither.
        ValueError: as `read_model`.
    """
    model = _uncompiled(model)
    within = getattr(model, "original_model", model)
    if not _is_hugging_face(within):
        raise TypeError(
            f"model: expected a Hugging Face causal LM, a bridge of one or a checkpoint, got {type(model).__name__}"
        )
    return found_of(within, wrapped=within is not model).layout


def _uncompiled(model: Any) -> Any:
    """The model that torch.compile wrapped, and whose weights it runs."""
    return getattr(model, "_orig_mod", model)


def _is_transformer_lens(model: Any) -> bool:
    if hasattr(model, "decoder_blocks") or hasattr(model, "encoder_blocks"):
        raise ValueError(
            "model: expected one stack of blocks whose last one the unembedding reads, got an encoder and a decoder; "
            "give the Hugging Face model itself, whose decoder is read, or a decoder-only model"
        )
    return all(hasattr(model, name) for name in ("cfg", "blocks", "W_U"))


def _is_hugging_face(model: Any) -> bool:
    return hasattr(model, "config") and hasattr(model, "get_parameter")


def _no_model(model: Any) -> TypeError:
    return TypeError(
        "model: expected a HookedTransformer, a TransformerBridge, a Hugging Face causal LM or a checkpoint folder, "
        f"got {type(model).__name__}"
    )


def _read_hugging_face(model: Any, tokenizer: Any) -> MLPWeights:
    layout, tensors = found_of(model).layout, HeldTensors(model)
    W_U = layout.unembedding.rows(tensors[layout.unembedding.tensor]).T
    return weights_of(layout, lambda: tensors, W_U=W_U, **_about(model, W_U, tokenizer))


def _hugging_face_unembedding(model: Any, tokenizer: Any) -> UnembeddingWeights:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: {class_of(model).__name__} has no unembedding; expected a causal language model")
    require_linear(head, "the unembedding")
    W_U = head.weight.detach().T
    try:
        layout = found_of(model).layout
    except ValueError:  # whatever its MLPs are, the model itself tells what its unembedding reads
        gain, centre = traced_final_norm(model, head)
        norm: dict[str, Any] = {"final_gain": gain, "centre": centre}
    else:
        gain = layout.final_gain(HeldTensors(model), W_U.shape[0])
        centre = layout.final is not None and layout.final.centre
        norm = {"final_gain": gain, "centre": centre, "final_norm": layout.final is not None}
    return UnembeddingWeights(d_model=W_U.shape[0], W_U=W_U, **norm, **_about(model, W_U, tokenizer))


def _about(model: Any, W_U: Tensor, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab": Vocab.of_tokenizer(tokenizer, W_U.shape[1]),
        "name": getattr(model.config, "name_or_path", "") or "unnamed",
        "class_name": class_of(model).__name__,
    }
