"""HookedTransformer, TransformerBridge and Hugging Face models to MLPWeights, and a refusal of all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_flash.vocab import Vocab
from tl_flash.weights.layouts import ARCHITECTURES, architecture
from tl_flash.weights.mlp import Layer, MLPWeights, UnembeddingWeights, require_finite
from tl_flash.weights.norms import traced_final_norm
from tl_flash.weights.probes import HeldTensors, require_linear, require_plain, require_readable

# A bridge's ln2 names the Hugging Face module it wraps; these come after the MLP.
_POST_NORMS = ("post_feedforward_layernorm", "output.LayerNorm")
# Their experts stack [gate, up] by [output, input]; others stack otherwise.
_STACKED_EXPERTS = ("MixtralExperts", "Qwen3MoeExperts")
_POST_NORM_ONLY = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def read_model(model: Any, *, tokenizer: Any = None) -> MLPWeights:
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
    model = _uncompiled(model)
    if _is_transformer_lens(model):
        return _read_transformer_lens(model, tokenizer)
    if hasattr(model, "config") and hasattr(model, "get_parameter"):
        return _read_hugging_face(model, tokenizer)
    raise _no_model(model)


def read_model_unembedding(model: Any, *, tokenizer: Any = None) -> UnembeddingWeights:
    """Find a model's unembedding and the norm before it, whatever its MLPs are; see `read_model`."""
    model = _uncompiled(model)
    if _is_transformer_lens(model):
        return UnembeddingWeights(**_transformer_lens_unembedding(model, tokenizer))
    if hasattr(model, "config") and hasattr(model, "get_parameter"):
        return UnembeddingWeights(**_hugging_face_unembedding(model, tokenizer))
    raise _no_model(model)


def _uncompiled(model: Any) -> Any:
    """The model that torch.compile wrapped, and whose weights it runs."""
    return getattr(model, "_orig_mod", model)


def _is_transformer_lens(model: Any) -> bool:
    if hasattr(model, "decoder_blocks") or hasattr(model, "encoder_blocks"):
        raise _two_stacks()
    return all(hasattr(model, name) for name in ("cfg", "blocks", "W_U"))


def _two_stacks() -> ValueError:
    return ValueError(
        "model: expected one stack of blocks whose last one the unembedding reads, got an encoder and a decoder; load "
        "a decoder-only model"
    )


def _no_model(model: Any) -> TypeError:
    return TypeError(
        "model: expected a HookedTransformer, a TransformerBridge, a Hugging Face causal LM or a checkpoint folder, "
        f"got {type(model).__name__}"
    )


def _transformer_lens_unembedding(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The fields of UnembeddingWeights."""
    cfg = model.cfg
    if getattr(model, "mlm_head", None) is not None:
        raise ValueError(
            "model: a dense layer stands between its last block and the unembedding (a masked language model such as "
            "BERT), so no direction of the residual stream is read by W_U; load a causal language model"
        )
    if cfg.normalization_type is not None and getattr(model, "ln_final", None) is None:
        raise ValueError("model: ln_final is missing, so the unembedding cannot be folded; expected a whole model")
    W_U = require_readable(model.W_U.detach(), "W_U")
    require_plain(model.unembed, [W_U], "unembed")
    gain = _norm_gain(getattr(model, "ln_final", None), cfg)
    return {
        "d_model": W_U.shape[0],
        "centre": _centres(cfg) and not _final_rms(cfg),
        "final_norm": cfg.normalization_type is not None,
        "W_U": W_U,
        "final_gain": None if gain is None else require_finite(gain, "ln_final: the norm's scale"),
        "vocab": Vocab.of_model(model, W_U.shape[1], tokenizer),
        "name": str(getattr(cfg, "model_name", None) or "unnamed"),
        "class_name": type(model).__name__,
    }


def _read_transformer_lens(model: Any, tokenizer: Any) -> MLPWeights:
    cfg = model.cfg
    _require_dense({layer: _dense_fault(block) for layer, block in enumerate(model.blocks)})
    probed: set[int] = set()

    def read_layer(layer: int) -> Layer:
        read = _transformer_lens_layer(model.blocks[layer], layer, cfg)
        if layer not in probed:
            matrices = [m for m in (read.W_in, read.W_gate, read.W_out) if isinstance(m, Tensor)]
            require_plain(model.blocks[layer].mlp, matrices, f"blocks.{layer}.mlp")
            probed.add(layer)
        return read

    first = read_layer(0)
    return MLPWeights(
        **_transformer_lens_unembedding(model, tokenizer),
        n_layers=len(model.blocks),
        d_mlp=first.d_mlp,
        centre_reads=_centres(cfg),
        read_layer=read_layer,
        sides=("in", "gate", "out") if first.W_gate is not None else ("in", "out"),
    )


def _centres(cfg: Any) -> bool:
    return (cfg.normalization_type or "").startswith("LN")


def _final_rms(cfg: Any) -> bool:
    """Whether the last norm is an RMSNorm where the others are LayerNorm."""
    return bool(getattr(cfg, "final_rms", False)) and _centres(cfg)


def _transformer_lens_layer(block: Any, layer: int, cfg: Any) -> Layer:
    mlp = block.mlp
    pre, post = _norms(block, layer, cfg)
    gains = {"gain_pre": _norm_gain(pre, cfg), "gain_post": _norm_gain(post, cfg)}
    experts = _experts(mlp)
    if experts is not None:
        up, gate, down = experts
        return Layer(up, tuple(matrix.T for matrix in down), gate, **gains)
    gate = getattr(mlp, "W_gate", None)
    return Layer(
        W_in=mlp.W_in.detach().T,
        W_out=mlp.W_out.detach(),
        W_gate=gate.detach().T if torch.is_tensor(gate) else None,
        gain_neurons=_neuron_gain(mlp),
        **gains,
    )


def _neuron_gain(mlp: Any) -> Tensor | None:
    gain = getattr(getattr(mlp, "ln", None), "w", None)
    return gain.detach() if torch.is_tensor(gain) else None


def _experts(mlp: Any) -> tuple[tuple[Tensor, ...], ...] | None:
    """Up, gate and down [output, input] of every expert; None where the MLP is dense, or its experts are not known."""
    experts = getattr(mlp, "experts", None)
    if experts is not None and type(experts).__name__ in _STACKED_EXPERTS:
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        return up.unbind(), gate.unbind(), experts.down_proj.detach().unbind()
    if not isinstance(experts, torch.nn.ModuleList) or not all(hasattr(expert, "W_in") for expert in experts):
        return None
    up, gate, down = (
        tuple(getattr(expert, name).weight.detach() for expert in experts) for name in ("W_in", "W_gate", "W_out")
    )
    return up, gate, down


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
    gain = gain.detach().to(torch.promote_types(gain.dtype, torch.float32))
    return gain + 1 if getattr(cfg, "rmsnorm_uses_offset", False) else gain


def _dense_fault(block: Any) -> str | None:
    """Why this block's neurons cannot be read, or None."""
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        return "no MLP"
    for name, parameter in mlp.named_parameters():  # before TransformerLens is asked for them, which may refuse itself
        require_readable(parameter, f"mlp.{name}")
    if _experts(mlp) is not None:
        return None
    W_in, W_out = getattr(mlp, "W_in", None), getattr(mlp, "W_out", None)
    if not torch.is_tensor(W_in) or not torch.is_tensor(W_out):
        return "no dense W_in and W_out (a mixture of experts?)"
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


def _read_hugging_face(model: Any, tokenizer: Any) -> MLPWeights:
    unembedding = _hugging_face_unembedding(model, tokenizer)
    tensors = HeldTensors(model)
    names = architecture(_class_name(model)).found_in(tensors)
    return MLPWeights(
        **unembedding,
        n_layers=model.config.get_text_config().num_hidden_layers,
        d_mlp=names.read_layer(0, tensors).d_mlp,
        read_layer=lambda layer: names.read_layer(layer, tensors),
        sides=("in", "gate", "out") if names.gated else ("in", "out"),
    )


def _hugging_face_unembedding(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The fields of UnembeddingWeights."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise _two_stacks()
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: {_class_name(model)} has no unembedding; expected a causal language model")
    require_linear(head, "the unembedding")
    W_U = head.weight.detach().T
    if _class_name(model) in ARCHITECTURES:
        tensors = HeldTensors(model)
        names = architecture(_class_name(model)).found_in(tensors)
        gain, centre = names.final_gain(tensors), names.centre
    else:
        gain, centre = traced_final_norm(model, head)
    return {
        "d_model": W_U.shape[0],
        "centre": centre,
        "W_U": W_U,
        "final_gain": gain,
        "vocab": Vocab.of_tokenizer(tokenizer, W_U.shape[1]),
        "name": getattr(model.config, "name_or_path", "") or "unnamed",
        "class_name": _class_name(model),
    }


def _class_name(model: Any) -> str:
    """Of a Hugging Face model; FSDP2 makes a class of its own for it."""
    return next(kind.__name__ for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
