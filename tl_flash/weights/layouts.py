"""Where Hugging Face causal language models keep their MLPs, norms and unembedding: one row an architecture."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tl_flash.weights.mlp import Layer, require_finite


@dataclass(frozen=True)
class Sizes:
    """What a config says of the shapes."""

    d_model: int
    d_mlp: int
    d_expert: int = 0
    n_experts: int = 0


@dataclass(frozen=True)
class Experts:
    """Names of the matrices of a layer's experts: each in a tensor of its own, or all stacked in one."""

    up: str
    gate: str
    down: str
    width: str = "intermediate_size"
    """What a config calls the neurons of one expert."""
    stacked_gate_up: str = "mlp.experts.gate_up_proj"
    """[expert, 2 d_mlp, d_model], the gates first."""
    stacked_down: str = "mlp.experts.down_proj"
    """[expert, d_model, d_mlp]"""

    def shapes(self, sizes: Sizes, stacked: bool) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer's experts, and the shape that each must have."""
        n, d_mlp, d_model = sizes.n_experts, sizes.d_expert, sizes.d_model
        if stacked:
            return {self.stacked_gate_up: (n, 2 * d_mlp, d_model), self.stacked_down: (n, d_model, d_mlp)}
        one = {self.up: (d_mlp, d_model), self.gate: (d_mlp, d_model), self.down: (d_model, d_mlp)}
        return {name.format(expert): shape for expert in range(n) for name, shape in one.items()}

    def read(self, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """Up, gate and down of every expert, three tuples."""
        if prefix + self.stacked_down in tensors:
            gate, up = tensors[prefix + self.stacked_gate_up].chunk(2, dim=1)
            return up.unbind(), gate.unbind(), tensors[prefix + self.stacked_down].unbind()
        experts = itertools.takewhile(lambda n: prefix + self.up.format(n) in tensors, itertools.count())
        every = [[tensors[prefix + name.format(n)] for name in (self.up, self.gate, self.down)] for n in experts]
        return tuple(zip(*every, strict=True))


@dataclass(frozen=True)
class Architecture:
    """Names of the tensors of one architecture, as in its checkpoints; all but the unembedding's follow `roots[0]`."""

    roots: tuple[str, ...] = ("model.", "")
    """What names begin with; the later ones are those of other ways to save the same model."""
    layer: str = "layers.{}."
    up: str = "mlp.up_proj.weight"
    down: str = "mlp.down_proj.weight"
    gate: str | None = "mlp.gate_proj.weight"
    fused: bool = False
    """`up` holds gate and up stacked, the gate first."""
    conv1d: bool = False
    """Matrices are stored [input, output], as GPT-2's Conv1D does."""
    experts: Experts | None = None
    """Of the layers that have no `up`."""
    pre: str | None = "post_attention_layernorm.weight"
    """The norm before the MLP; `post` the one after it."""
    post: str | None = None
    final: str = "norm.weight"
    embedding: str = "embed_tokens.weight"
    unembeddings: tuple[str, ...] = ("lm_head.weight",)
    """What the unembedding may be called."""
    tied: bool = False
    """The embedding is the unembedding, unless the config says otherwise."""
    centre: bool = False
    offset: float = 0.0
    """The norms scale by offset + weight (Gemma: 1)."""
    d_vocab: int | None = None
    """What a config means that names no vocabulary size."""

    @property
    def gated(self) -> bool:
        """Whether the neurons have a gate."""
        return self.gate is not None

    def found_in(self, tensors: Container[str]) -> Architecture:
        """The same names with the root alone under which these tensors are kept; the first where there are none."""
        root = next((root for root in self.roots if root + self.embedding in tensors), self.roots[0])
        return replace(self, roots=(root,))

    def shapes(self, layer: int, tensors: Container[str], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """The tensors that a layer's neurons need, and the shape that each must have."""
        norms = {norm: (sizes.d_model,) for norm in (self.pre, self.post) if norm is not None}
        prefix = self.roots[0] + self.layer.format(layer)
        if self.experts is not None and prefix + self.up not in tensors:
            matrices = self.experts.shapes(sizes, stacked=prefix + self.experts.stacked_down in tensors)
        else:
            up, down = (sizes.d_mlp * (2 if self.fused else 1), sizes.d_model), (sizes.d_model, sizes.d_mlp)
            matrices = {self.up: up[::-1] if self.conv1d else up, self.down: down[::-1] if self.conv1d else down}
            if self.gate is not None and not self.fused:
                matrices[self.gate] = up
        return {prefix + name: shape for name, shape in (norms | matrices).items()}

    def final_gain(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scale of the norm before the unembedding, float32 [d_model]."""
        gain = tensors[self.roots[0] + self.final].float() + self.offset
        return require_finite(gain, "the final norm's scale")

    def read_layer(self, layer: int, tensors: Mapping[str, Tensor]) -> Layer:
        """Put one layer together from tensors, whatever holds them."""
        prefix = self.roots[0] + self.layer.format(layer)

        def gain(key: str | None) -> Tensor | None:
            return tensors[prefix + key].float() + self.offset if key else None

        pre, post = gain(self.pre), gain(self.post)
        if self.experts is not None and prefix + self.up not in tensors:
            up, gate, down = self.experts.read(prefix, tensors)
            return Layer(up, tuple(matrix.T for matrix in down), gate, gain_pre=pre, gain_post=post)
        up, down = tensors[prefix + self.up], tensors[prefix + self.down]
        gate = tensors[prefix + self.gate] if self.gate and not self.fused else None
        if self.fused:
            gate, up = up.chunk(2)
        if self.conv1d:
            up, down = up.T, down.T
        return Layer(up, down.T, gate, gain_pre=pre, gain_post=post)


_LLAMA = Architecture()
_GEMMA_2 = Architecture(
    pre="pre_feedforward_layernorm.weight", post="post_feedforward_layernorm.weight", offset=1.0, tied=True
)
_OLMO_2 = Architecture(pre=None, post="post_feedforward_layernorm.weight")
ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(
        roots=("transformer.", ""),
        layer="h.{}.",
        up="mlp.c_fc.weight",
        down="mlp.c_proj.weight",
        gate=None,
        conv1d=True,
        pre="ln_2.weight",
        final="ln_f.weight",
        embedding="wte.weight",
        tied=True,
        centre=True,
    ),
    "GPTNeoXForCausalLM": Architecture(
        roots=("gpt_neox.", ""),
        up="mlp.dense_h_to_4h.weight",
        down="mlp.dense_4h_to_h.weight",
        gate=None,
        final="final_layer_norm.weight",
        embedding="embed_in.weight",
        unembeddings=("embed_out.weight", "lm_head.weight"),
        centre=True,
    ),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA_2,
    "Gemma3ForCausalLM": _GEMMA_2,
    "Gemma3ForConditionalGeneration": replace(
        _GEMMA_2,
        roots=("model.language_model.", "language_model.model."),
        unembeddings=("lm_head.weight", "language_model.lm_head.weight"),
        d_vocab=262_208,
    ),
    "Olmo2ForCausalLM": _OLMO_2,
    "Phi3ForCausalLM": Architecture(up="mlp.gate_up_proj.weight", fused=True),
    "MixtralForCausalLM": Architecture(
        experts=Experts(
            up="block_sparse_moe.experts.{}.w3.weight",
            gate="block_sparse_moe.experts.{}.w1.weight",
            down="block_sparse_moe.experts.{}.w2.weight",
        )
    ),
    "Qwen3MoeForCausalLM": Architecture(
        experts=Experts(
            up="mlp.experts.{}.up_proj.weight",
            gate="mlp.experts.{}.gate_proj.weight",
            down="mlp.experts.{}.down_proj.weight",
            width="moe_intermediate_size",
        )
    ),
}


def architecture(name: str) -> Architecture:
    """The row of an architecture, by the class name that its config gives.

    Raises:
        ValueError: it is not known; the message lists those that are.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"architecture {name!r} is not known; known are {', '.join(ARCHITECTURES)}. "
            "Load the model as a TransformerLens TransformerBridge and decode that instead (--surface bridge)"
        )
    return ARCHITECTURES[name]
