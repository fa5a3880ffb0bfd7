"""HookedTransformer, TransformerBridge and Hugging Face models to MLPWeights, and a refusal of all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_flash.architectures import Architecture, architecture
from tl_flash.vocab import Vocab
from tl_flash.weights import Layer, MLPWeights, require_finite

# A bridge's ln2 names the Hugging Face module it wraps; these come after the MLP.
_POST_NORMS = ("post_feedforward_layernorm", "output.LayerNorm")
_POST_NORM_ONLY = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def read(model: Any, *, tokenizer: Any = None) -> MLPWeights:
    """Find a model's MLP weights.

    Args:
        model: a HookedTransformer or subclass, a TransformerBridge, or a Hugging Face causal LM; recognised by what it
            has, so that TransformerLens need not be imported.
        tokenizer: names the tokens; by default the model's own.

    Raises:
        TypeError: it is none of these.
        ValueError: some layers hold no dense MLP whose matrices can be read (mixtures of experts, quantised
            weights), or a norm is missing.
    """
    if all(hasattr(model, name) for name in ("cfg", "blocks", "W_U")):
        return _read_transformer_lens(model, tokenizer)
    if hasattr(model, "config") and hasattr(model, "get_parameter"):
        return _read_hugging_face(model, tokenizer)
    raise TypeError(
        "model: expected a HookedTransformer, a TransformerBridge, a Hugging Face causal LM or a checkpoint folder, "
        f"got {type(model).__name__}"
    )


def chosen_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    """The layers asked for, all by default.

    Raises:
        TypeError: not whole numbers.
        ValueError: none, unknown ones, or one twice.
    """
    chosen = list(range(n_layers)) if layers is None else list(layers)
    if not chosen:
        raise ValueError("layers: expected at least one layer, got an empty list; leave it out to decode all")
    for layer in chosen:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"layers: expected whole numbers, got {layer!r}")
        if not 0 <= layer < n_layers:
            raise ValueError(f"layers: expected layers from 0 to {n_layers - 1}, got {layer}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers: expected each layer once, got {chosen}")
    return [int(layer) for layer in chosen]


def _read_transformer_lens(model: Any, tokenizer: Any) -> MLPWeights:
    cfg = model.cfg
    _require_dense({layer: _dense_fault(block) for layer, block in enumerate(model.blocks)})
    first = model.blocks[0].mlp
    W_U = _floating(model.W_U.detach(), "W_U")
    gated = torch.is_tensor(getattr(first, "W_gate", None))
    gain = _norm_gain(getattr(model, "ln_final", None), cfg)
    if cfg.normalization_type is not None and getattr(model, "ln_final", None) is None:
        raise ValueError("model: ln_final is missing, so the unembedding cannot be folded; expected a whole model")
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    return MLPWeights(
        n_layers=len(model.blocks),
        d_mlp=first.W_in.shape[1],
        d_model=W_U.shape[0],
        centre=_centres(cfg),
        W_U=W_U,
        final_gain=None if gain is None else require_finite(gain, "ln_final: the norm's scale"),
        read_layer=lambda layer: _transformer_lens_layer(model.blocks[layer], layer, cfg),
        sides=("in", "gate", "out") if gated else ("in", "out"),
        vocab=Vocab.of_tokenizer(tokenizer, W_U.shape[1]),
        name=str(getattr(cfg, "model_name", None) or "unnamed"),
        class_name=type(model).__name__,
    )


def _centres(cfg: Any) -> bool:
    return (cfg.normalization_type or "").startswith("LN")


def _transformer_lens_layer(block: Any, layer: int, cfg: Any) -> Layer:
    mlp = block.mlp
    pre, post = _norms(block, layer, cfg)
    gate = getattr(mlp, "W_gate", None)
    return Layer(
        W_in=mlp.W_in.detach().T,
        W_out=mlp.W_out.detach(),
        W_gate=gate.detach().T if torch.is_tensor(gate) else None,
        gain_pre=_norm_gain(pre, cfg),
        gain_post=_norm_gain(post, cfg),
    )


def _norms(block: Any, layer: int, cfg: Any) -> tuple[Any, Any]:
    """The norms before and after a block's MLP, under whatever names this surface gives them."""
    pre, post = getattr(block, "ln2", None), getattr(block, "ln2_post", None)
    architecture = getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None)
    named_post = getattr(pre, "name", None) in _POST_NORMS
    if pre is not None and (architecture in _POST_NORM_ONLY or named_post):
        return None, pre
    if pre is None and post is None and getattr(cfg, "parallel_attn_mlp", False):
        pre = getattr(block, "ln1", None)  # GPT-J, Phi, Falcon: attention and MLP share one norm
    if pre is None and post is None and cfg.normalization_type is not None:
        raise ValueError(
            f"layer {layer}: no norm found at ln2, ln2_post or (parallel blocks) ln1, yet the model says "
            f"normalization_type={cfg.normalization_type!r}; expected one, so that its scale can be folded"
        )
    return pre, post


def _norm_gain(norm: Any, cfg: Any) -> Tensor | None:
    gain = getattr(norm, "w", None)
    if not torch.is_tensor(gain):
        return None
    gain = gain.detach().float()
    return gain + 1 if getattr(cfg, "rmsnorm_uses_offset", False) else gain


def _dense_fault(block: Any) -> str | None:
    """Why this block's neurons cannot be read, or None."""
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        return "no MLP"
    W_in, W_out = getattr(mlp, "W_in", None), getattr(mlp, "W_out", None)
    if not torch.is_tensor(W_in) or not torch.is_tensor(W_out):
        return "no dense W_in and W_out (a mixture of experts?)"
    if not (W_in.is_floating_point() and W_out.is_floating_point()):
        return f"weights of {W_in.dtype} (quantised)"
    if W_in.ndim != 2 or W_out.shape != W_in.shape[::-1]:
        return f"W_in {tuple(W_in.shape)} and W_out {tuple(W_out.shape)}, expected [d_model, d_mlp] and its reverse"
    return None


def _require_dense(faults: dict[int, str | None]) -> None:
    bad = {layer: fault for layer, fault in faults.items() if fault is not None}
    if not faults:
        raise ValueError("model: it has no layers; expected at least one block with an MLP")
    if bad:
        reasons = "; ".join(sorted(set(bad.values())))
        raise ValueError(
            f"model: expected a readable dense MLP in every layer, but {_ranges(bad)} of {len(faults)} hold none: "
            f"{reasons}. Such neurons have no single W_in row, so nothing faithful can be said of them here"
        )


def _ranges(layers: Any) -> str:
    numbers = sorted(layers)
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]}-{numbers[-1]}"
    return "layer" + "s" * (len(numbers) > 1) + " " + ", ".join(map(str, numbers))


def _floating(tensor: Tensor, what: str) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{what}: expected floating-point weights, got {tensor.dtype} (quantised?)")
    return tensor


def _read_hugging_face(model: Any, tokenizer: Any) -> MLPWeights:
    name = type(model).__name__
    _require_dense({layer: _expert_fault(block) for layer, block in enumerate(_hugging_face_blocks(model))})
    names = architecture(name)
    config = model.config

    def tensor(key: str) -> Tensor:
        return _floating(model.get_parameter(key).detach(), key)

    W_U = _floating(model.get_output_embeddings().weight.detach(), "W_U").T
    n_layers = config.num_hidden_layers
    first = layer_from_tensors(names, 0, tensor)
    return MLPWeights(
        n_layers=n_layers,
        d_mlp=first.W_in.shape[0],
        d_model=W_U.shape[0],
        centre=names.centre,
        W_U=W_U,
        final_gain=require_finite(tensor(names.final).float() + names.offset, "the final norm's scale"),
        read_layer=lambda layer: layer_from_tensors(names, layer, tensor),
        sides=("in", "gate", "out") if first.W_gate is not None else ("in", "out"),
        vocab=Vocab.of_tokenizer(tokenizer, W_U.shape[1]),
        name=getattr(config, "name_or_path", "") or "unnamed",
        class_name=name,
    )


def _hugging_face_blocks(model: Any) -> Any:
    """A Hugging Face model's blocks, under whatever name its family gives them."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return next((blocks for blocks in lists if len(blocks) == model.config.num_hidden_layers), [torch.nn.Module()])


def _expert_fault(block: torch.nn.Module) -> str | None:
    if any(hasattr(module, "experts") for module in block.modules()):
        return "no dense W_in and W_out (a mixture of experts?)"
    return None


def layer_from_tensors(names: Architecture, layer: int, tensor: Callable[[str], Tensor]) -> Layer:
    """Put one layer together from an architecture's tensors, whatever holds them."""
    prefix = names.layer.format(layer)
    up, down = tensor(prefix + names.up), tensor(prefix + names.down)
    gate = tensor(prefix + names.gate) if names.gate and not names.fused else None
    if names.fused:
        gate, up = up.chunk(2)
    if names.conv1d:
        up, down = up.T, down.T

    def gain(key: str | None) -> Tensor | None:
        return tensor(prefix + key).float() + names.offset if key else None

    return Layer(W_in=up, W_out=down.T, W_gate=gate, gain_pre=gain(names.pre), gain_post=gain(names.post))
