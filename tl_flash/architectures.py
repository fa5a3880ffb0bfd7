"""Where Hugging Face causal language models keep their MLPs, norms and unembedding: one row an architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Names of the tensors of one architecture, as in its checkpoints; a layer's follow `layer`."""

    layer: str = "model.layers.{}."
    up: str = "mlp.up_proj.weight"
    down: str = "mlp.down_proj.weight"
    gate: str | None = "mlp.gate_proj.weight"
    fused: bool = False
    """`up` holds gate and up stacked, the gate first."""
    conv1d: bool = False
    """Matrices are stored [input, output], as GPT-2's Conv1D does."""
    pre: str | None = "post_attention_layernorm.weight"
    """The norm before the MLP; `post` the one after it."""
    post: str | None = None
    final: str = "model.norm.weight"
    embedding: str = "model.embed_tokens.weight"
    unembedding: str = "lm_head.weight"
    centre: bool = False
    offset: float = 0.0
    """The norms scale by offset + weight (Gemma: 1)."""


_LLAMA = Architecture()
_GEMMA_2 = Architecture(pre="pre_feedforward_layernorm.weight", post="post_feedforward_layernorm.weight", offset=1.0)
_OLMO_2 = Architecture(pre=None, post="post_feedforward_layernorm.weight")

ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(
        layer="transformer.h.{}.",
        up="mlp.c_fc.weight",
        down="mlp.c_proj.weight",
        gate=None,
        conv1d=True,
        pre="ln_2.weight",
        final="transformer.ln_f.weight",
        embedding="transformer.wte.weight",
        centre=True,
    ),
    "GPTNeoXForCausalLM": Architecture(
        layer="gpt_neox.layers.{}.",
        up="mlp.dense_h_to_4h.weight",
        down="mlp.dense_4h_to_h.weight",
        gate=None,
        final="gpt_neox.final_layer_norm.weight",
        embedding="gpt_neox.embed_in.weight",
        unembedding="embed_out.weight",
        centre=True,
    ),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA_2,
    "Gemma3ForCausalLM": _GEMMA_2,
    "Olmo2ForCausalLM": _OLMO_2,
    "Phi3ForCausalLM": Architecture(up="mlp.gate_up_proj.weight", fused=True),
}


def architecture(name: str) -> Architecture:
    """The row of an architecture, by the class name that its config gives.

    Raises:
        ValueError: it is not known; the message lists those that are.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"architecture {name!r} is not known; known are {', '.join(ARCHITECTURES)}. "
            "Load the model as a TransformerLens TransformerBridge and decode that instead"
        )
    return ARCHITECTURES[name]
