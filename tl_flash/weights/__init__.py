"""The weights wing: what is read of a model, whatever holds it.

Where a class of models keeps its neurons is a `Layout` (`layouts`), found by watching a tiny model of that class run
(`tiny`, `calls`, `tracing`, `experts`; `found` keeps them, `naming` tells the names of what is saved). By it a Hugging
Face model (`memory`), one of TransformerLens (`hooked`), a checkpoint on disk or on the hub (`checkpoint`, one file a
format in `formats/`) become `MLPWeights` (`reading`, `mlp`).
"""

from pathlib import Path
from typing import Any

from tl_flash.weights.checkpoint import checkpoint_layout, read_checkpoint, read_checkpoint_unembedding
from tl_flash.weights.fingerprints import Sums, combined, digest, fingerprint
from tl_flash.weights.layouts import Layout
from tl_flash.weights.loading import load_model
from tl_flash.weights.memory import model_layout, read_model, read_model_unembedding
from tl_flash.weights.mlp import Layer, MLPWeights, UnembeddingWeights, chosen_layers, require_side
from tl_flash.weights.running import differentiating, measuring

__all__ = [
    "Layer",
    "Layout",
    "MLPWeights",
    "Sums",
    "UnembeddingWeights",
    "chosen_layers",
    "combined",
    "differentiating",
    "digest",
    "fingerprint",
    "layout",
    "load_model",
    "measuring",
    "read",
    "read_unembedding",
    "require_side",
]


def read(model: Any, *, tokenizer: Any = None) -> MLPWeights:
    """The MLP weights of a model, or of a checkpoint given by its folder or its name on the hub.

    Args:
        model: as `flash_decode` takes it, or what this gave of it: then nothing is read anew.
        tokenizer: names the tokens; by default the model's own.

    Raises:
        TypeError: neither a model nor a checkpoint.
        FileNotFoundError: no such checkpoint, or a file of it is missing.
        ValueError: it cannot be read faithfully; the message says why.

    Example:
        >>> from tl_flash import weights
        >>> weights.read(model).directions(1, "out").shape == (model.cfg.d_mlp, model.cfg.d_model)
        True
    """
    if isinstance(model, MLPWeights) and tokenizer is None:
        return model
    if isinstance(model, str | Path):
        return read_checkpoint(model, tokenizer=tokenizer)
    return read_model(model, tokenizer=tokenizer)


def read_unembedding(model: Any, *, tokenizer: Any = None) -> UnembeddingWeights:
    """The unembedding of a model and the norm before it, whatever its MLPs are.

    Args:
        model: as `read` takes it; also one without MLPs, or with such as cannot be read.
        tokenizer: names the tokens; by default the model's own.

    Raises:
        TypeError: neither a model nor a checkpoint.
        FileNotFoundError: no such checkpoint, or a file of it is missing.
        ValueError: it cannot be read faithfully; the message says why.

    Example:
        >>> from tl_flash import weights
        >>> weights.read_unembedding(model).W_U.shape == (model.cfg.d_model, model.cfg.d_vocab)
        True
    """
    if isinstance(model, str | Path):
        return read_checkpoint_unembedding(model, tokenizer=tokenizer)
    return read_model_unembedding(model, tokenizer=tokenizer)


def layout(model: Any) -> Layout:
    """Where a model keeps its neurons, to be compared with its code; no weight of a checkpoint is read.

    Args:
        model: a Hugging Face model, a bridge of one, or a checkpoint by its folder or its name on the hub.

    Returns:
        Layout: prints as a table.

    Raises:
        TypeError: neither of these.
        FileNotFoundError: no such checkpoint.
        ValueError: the layout cannot be found; the message says why.

    Example:
        >>> from tl_flash import weights
        >>> weights.layout(model).layers[0].pre.weight
        'post_attention_layernorm.weight'
    """
    return checkpoint_layout(model) if isinstance(model, str | Path) else model_layout(model)
