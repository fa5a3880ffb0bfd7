"""Models of TransformerLens to MLPWeights: what their norms do is asked of the norms, not read off flags or names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tl_flash.vocab import Vocab
from tl_flash.weights.found import NotTraced, found_of
from tl_flash.weights.layouts import Layout
from tl_flash.weights.mlp import Layer, MLPWeights, UnembeddingWeights, require_finite
from tl_flash.weights.norms import logit_factor, nearer_factor, probed_gain
from tl_flash.weights.places import Norm
from tl_flash.weights.probes import HeldTensors, require_plain, require_readable
from tl_flash.weights.reading import first_readable, require_readable_layers
from tl_flash.weights.running import measuring
from tl_flash.weights.tiny import token_ids

# Without a layout: a bridge's ln2 names the Hugging Face module it wraps; these come after the MLP.
_POST_NORMS = ("post_feedforward_layernorm", "output.LayerNorm")
_POST_NORM_ONLY = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def read_transformer_lens(model: Any, tokenizer: Any) -> MLPWeights:
    """A HookedTransformer's or a TransformerBridge's weights, folded or not.

    Raises:
        ValueError: its neurons cannot be read faithfully; the message says why.
    """
    if len(model.blocks) == 0:
        raise ValueError("model: it has no layers; expected at least one block with an MLP")
    require_readable(model.W_U.detach(), "W_U")
    held = _Held(model, _layout(model))
    first = held.layer(held.first)
    return MLPWeights(
        **vars(_unembedding(held, tokenizer)),
        n_layers=len(model.blocks),
        d_mlp=first.d_mlp,
        read_layer=held.layer,
        sides=("in", "gate", "out") if first.W_gate is not None else ("in", "out"),
    )


def transformer_lens_unembedding(model: Any, tokenizer: Any) -> UnembeddingWeights:
    """The unembedding of a model of TransformerLens and the norm before it, whatever its MLPs are.

    Raises:
        ValueError: no direction of the residual stream is read by W_U through a norm alone.
    """
    return _unembedding(_Held(model, _layout(model)), tokenizer)


def _unembedding(held: _Held, tokenizer: Any) -> UnembeddingWeights:
    model = held.model
    if getattr(model, "mlm_head", None) is not None:
        raise ValueError(
            "model: a dense layer stands between its last block and the unembedding (a masked language model such as "
            "BERT), so no direction of the residual stream is read by W_U; load a causal language model"
        )
    W_U = require_readable(model.W_U.detach(), "W_U")
    require_plain(model.unembed, [W_U], "unembed")
    return UnembeddingWeights(
        d_model=W_U.shape[0],
        centre=held.centre and not held.final_rms,
        final_norm=held.has_final_norm,
        W_U=W_U,
        final_gain=held.final_gain(),
        vocab=Vocab.of_model(model, W_U.shape[1], tokenizer),
        name=str(getattr(model.cfg, "model_name", None) or "unnamed"),
        class_name=type(model).__name__,
    )


def _layout(model: Any) -> Layout | None:
    """That of the Hugging Face model within a bridge; None where there is none, or none that can be made small."""
    within = getattr(model, "original_model", None)
    if within is None or not hasattr(getattr(within, "config", None), "to_json_string"):
        return None
    try:
        return found_of(within, wrapped=True).layout
    except NotTraced:
        return None


@dataclass(frozen=True, eq=False)
class _Held:
    """A model of TransformerLens, with the layout of what it was made of where that is known."""

    model: Any
    layout: Layout | None
    probed: set[int] = field(default_factory=set)
    """Layers whose modules were found to do what their weights say."""

    @cached_property
    def tensors(self) -> HeldTensors:
        """Those of the model within a bridge, by the names that they had before it was wrapped."""
        return HeldTensors(self.model.original_model)

    @property
    def centre(self) -> bool:
        if self.layout is not None:
            return self.layout.centre
        return (self.model.cfg.normalization_type or "").startswith("LN")

    @property
    def first(self) -> int:
        """The first layer that holds neurons."""
        return self.readable[0] if self.layout is None else first_readable(self.layout)

    @property
    def readable(self) -> list[int]:
        """Layers that hold neurons, by TransformerLens's own names."""
        faults = {layer: _fault(block) for layer, block in enumerate(self.model.blocks)}
        readable = [layer for layer, fault in faults.items() if fault is None]
        if not readable:
            reasons = "; ".join(sorted({fault for fault in faults.values() if fault}))
            raise ValueError(
                f"model: expected a readable MLP in some layer, but none of {len(faults)} holds one: {reasons}"
            )
        return readable

    @property
    def has_final_norm(self) -> bool:
        return self.model.cfg.normalization_type is not None and getattr(self.model, "ln_final", None) is not None

    @property
    def final_rms(self) -> bool:
        """Whether the last norm is an RMSNorm where the others are LayerNorm."""
        return self.layout is None and self.centre and bool(getattr(self.model.cfg, "final_rms", False))

    def final_gain(self) -> Tensor | None:
        """What multiplies each coordinate before the unembedding."""
        cfg, norm = self.model.cfg, getattr(self.model, "ln_final", None)
        if (
            norm is None
            and cfg.normalization_type is not None
            and (self.layout is None or self.layout.final is not None)
        ):
            raise ValueError("model: ln_final is missing, so the unembedding cannot be folded; expected a whole model")
        gain, scale = self._gain(norm, centre=self.centre and not self.final_rms), self._scale()
        if scale != 1:
            gain = (torch.ones(len(self.model.W_U)) if gain is None else gain) * scale
        return None if gain is None else require_finite(gain, "ln_final: the norm's scale")

    def _scale(self) -> float:
        """What the model multiplies its logits by: where its class does so, it is run to see, since folding may too."""
        scale = 1.0 if self.layout is None else self.layout.multiplier(len(self.model.W_U))
        if scale == 1:
            return 1.0
        seen: list[Tensor] = []
        handle = self.model.unembed.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        try:
            with measuring(self.model):
                logits = self.model(token_ids().to(self.model.W_U.device))
        finally:
            handle.remove()
        return nearer_factor(logit_factor(logits, seen[-1]), 1.0, scale)

    def layer(self, layer: int) -> Layer:
        """Put one layer together, once its modules were found to do what their weights say."""
        read = self._put_together(layer)
        mlp = getattr(self.model.blocks[layer], "mlp", None)
        if layer not in self.probed and mlp is not None:  # what is read under other names is probed as it is read
            matrices = [matrix for matrix in (read.W_in, read.W_gate, read.W_out) if isinstance(matrix, Tensor)]
            require_plain(mlp, matrices, f"blocks.{layer}.mlp")
            self.probed.add(layer)
        return read

    def _put_together(self, layer: int) -> Layer:
        if self.layout is not None:
            require_readable_layers(self.layout, [layer])
            return self._by_layout(self.layout, layer)
        block = self.model.blocks[layer]
        fault = _fault(block)
        if fault is not None:
            raise ValueError(f"layer {layer}: {fault}; give layers={self.readable}, which can be read")
        pre, post = _roles(block, layer, self.model.cfg)
        read = _of_block(block.mlp, gain_pre=self._gain(pre), gain_post=self._gain(post))
        return replace(read, centre_pre=self.centre)

    def _by_layout(self, layout: Layout, layer: int) -> Layer:
        prefix, rows = layout.prefix(layer), layout.layers[layer]
        gains = [gain for norm in rows.post if (gain := self._probe(norm, prefix)) is not None]
        scales = {
            "gain_pre": None if rows.pre is None else self._probe(rows.pre, prefix),
            "gain_post": torch.stack(gains).prod(0) if gains else None,
            "gain_neurons": None,
        }
        block = self.model.blocks[layer]
        if rows.of_neurons is not None:
            scales["gain_neurons"] = self._probe(rows.of_neurons, prefix, block.mlp.W_out)
        if len(rows.neurons) == 1 and not rows.neurons[0].routed and _fault(block) is None:
            kinds = {
                "centre_pre": rows.pre is not None and rows.pre.centre,
                "centre_post": any(n.centre for n in rows.post),
                "centre_neurons": rows.of_neurons is not None and rows.of_neurons.centre,
            }
            return replace(_of_block(block.mlp), **scales, **kinds)
        return rows.put_together([neurons.read(self.tensors, prefix) for neurons in rows.neurons], **scales)

    def _gain(self, norm: Any, *, centre: bool | None = None) -> Tensor | None:
        return None if norm is None else probed_gain(norm, self.model.W_U, self.centre if centre is None else centre)

    def _probe(self, norm: Norm, prefix: str, like: Tensor | None = None) -> Tensor | None:
        """The gain of one of the layout's norms, as the model has it now."""
        if norm.weight is None:
            return None
        module = self.model.original_model.get_submodule(prefix + norm.weight.rpartition(".")[0])
        return probed_gain(module, self.model.W_U if like is None else like, norm.centre)


# Blocks of TransformerLens


def _of_block(mlp: Any, gain_pre: Tensor | None = None, gain_post: Tensor | None = None) -> Layer:
    experts = getattr(mlp, "experts", None)
    if isinstance(experts, nn.ModuleList):
        names = ("W_in", "W_gate", "W_out")
        up, gate, down = (tuple(getattr(expert, name).weight.detach() for expert in experts) for name in names)
        return Layer(up, tuple(matrix.T for matrix in down), gate, gain_pre, gain_post)
    gate = getattr(mlp, "W_gate", None)
    return Layer(
        W_in=mlp.W_in.detach().T,
        W_out=mlp.W_out.detach(),
        W_gate=gate.detach().T if torch.is_tensor(gate) else None,
        gain_neurons=_neuron_gain(mlp),
        gain_pre=gain_pre,
        gain_post=gain_post,
    )


def _neuron_gain(mlp: Any) -> Tensor | None:
    gain = getattr(getattr(mlp, "ln", None), "w", None)
    return gain.detach() if torch.is_tensor(gain) else None


def _fault(block: Any) -> str | None:
    """Why a block's neurons cannot be read by TransformerLens's own names, or None."""
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        return "no MLP"
    for name, parameter in mlp.named_parameters():  # before TransformerLens is asked for them, which may refuse itself
        require_readable(parameter, f"mlp.{name}")
    experts = getattr(mlp, "experts", None)
    if isinstance(experts, nn.ModuleList) and all(hasattr(expert, "W_in") for expert in experts):
        return None
    W_in, W_out = getattr(mlp, "W_in", None), getattr(mlp, "W_out", None)
    if not torch.is_tensor(W_in) or not torch.is_tensor(W_out):
        return "no dense W_in and W_out (a mixture of experts?)"
    if W_in.ndim != 2 or W_out.shape != W_in.shape[::-1]:
        return f"W_in {tuple(W_in.shape)} and W_out {tuple(W_out.shape)}, expected [d_model, d_mlp] and its reverse"
    return None


def _roles(block: Any, layer: int, cfg: Any) -> tuple[Any, Any]:
    """The norms before and after a block's MLP, by the names that TransformerLens gives them."""
    pre, post = getattr(block, "ln2", None), getattr(block, "ln2_post", None)
    architecture = getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None)
    if pre is not None and (architecture in _POST_NORM_ONLY or getattr(pre, "name", None) in _POST_NORMS):
        return None, pre
    if pre is None and post is None and getattr(cfg, "parallel_attn_mlp", False):
        pre = getattr(block, "ln1", None)  # GPT-J, Phi, Falcon: attention and MLP share one norm
    if pre is None and post is None and cfg.normalization_type is not None:
        raise ValueError(
            f"layer {layer}: no norm found at ln2, ln2_post or (parallel blocks) ln1, yet the model says "
            f"normalization_type={cfg.normalization_type!r}; expected one, so that its scale can be folded"
        )
    return pre, post
