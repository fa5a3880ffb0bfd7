"""Tiny random models of every family, on every surface that TransformerLens gives them, and their float64 truth.

A surface is one way to hold a model: "hf" (the plain Hugging Face model), "bridge" (TransformerBridge),
"bridge-compat" (in compatibility mode: weights folded), "hooked" (HookedTransformer, folded) and "hooked-raw".

The truth reads no norm's attributes: it calls each norm and each linear map in float64 and takes from the answers what
they do. `test_models.py` checks it against the model's own forward pass before comparing anything with it.
"""

from __future__ import annotations

import copy
import warnings
from functools import cache
from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tl_flash.weights import differentiating

D_MODEL, D_MLP, N_LAYERS, D_VOCAB, N_TOKENS, N_HEADS, N_CTX = 40, 52, 2, 97, 72, 4, 64
TRANSFORMER_LENS = int(version("transformer-lens").split(".")[0])
STACKS_EXPERTS = hasattr(transformers, "TokenizersBackend")
HAS_HOOKED_TRANSFORMER, HAS_BRIDGE = TRANSFORMER_LENS < 4, TRANSFORMER_LENS > 2


class Family(NamedTuple):
    """Where a family keeps its parts, as module paths, and what HookedTransformer must be told of it."""

    config: transformers.PretrainedConfig
    layers: str = "model.layers"
    pre_norm: str | None = "post_attention_layernorm"
    post_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    layer_norm: bool = False
    offset_gain: bool = False  # the norm multiplies by 1 + weight
    act_fn: str = "silu"
    convert: str = ""  # TransformerLens's weight conversion
    hooked: dict = {}  # HookedTransformerConfig fields that differ from Llama's


_SIZES = dict(
    vocab_size=D_VOCAB,
    hidden_size=D_MODEL,
    intermediate_size=D_MLP,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=N_HEADS,
    max_position_embeddings=N_CTX,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
_GROUPED = _SIZES | dict(num_key_value_heads=2)
_SANDWICH = dict(  # norms before and after the MLP
    pre_norm="pre_feedforward_layernorm",
    post_norm="post_feedforward_layernorm",
    offset_gain=True,
    act_fn="gelu_pytorch_tanh",
    convert="convert_gemma_weights",
)
_LOCAL = dict(use_local_attn=True, window_size=16)

FAMILIES = {
    "gpt2": Family(
        transformers.GPT2Config(
            vocab_size=D_VOCAB,
            n_embd=D_MODEL,
            n_inner=D_MLP,
            n_layer=N_LAYERS,
            n_head=N_HEADS,
            n_positions=N_CTX,
            bos_token_id=0,
            eos_token_id=1,
        ),
        layers="transformer.h",
        pre_norm="ln_2",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        final_norm="transformer.ln_f",
        layer_norm=True,
        convert="convert_gpt2_weights",
        act_fn="gelu_new",
        hooked=dict(normalization_type="LN", positional_embedding_type="standard"),
    ),
    "neox": Family(
        transformers.GPTNeoXConfig(**_SIZES),
        layers="gpt_neox.layers",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        layer_norm=True,
        convert="convert_neox_weights",
        act_fn="gelu",
        hooked=dict(normalization_type="LN", rotary_dim=2, parallel_attn_mlp=True),
    ),
    "llama": Family(transformers.LlamaConfig(**_GROUPED), convert="convert_llama_weights"),
    "mistral": Family(
        transformers.MistralConfig(**_GROUPED, sliding_window=16),
        convert="convert_mistral_weights",
        hooked=dict(**_LOCAL, attn_types=["local", "local"]),
    ),
    "qwen2": Family(transformers.Qwen2Config(**_GROUPED), convert="convert_qwen2_weights"),
    "qwen3": Family(
        transformers.Qwen3Config(**_GROUPED, head_dim=12),
        convert="convert_qwen3_weights",
        hooked=dict(use_qk_norm=True),
    ),
    "gemma2": Family(
        transformers.Gemma2Config(**_GROUPED, head_dim=12, query_pre_attn_scalar=12, sliding_window=16),
        **_SANDWICH,
        hooked=dict(
            **_LOCAL,
            attn_types=["local", "global"],
            use_normalization_before_and_after=True,
            attn_scores_soft_cap=50.0,
            output_logits_soft_cap=30.0,
        ),
    ),
    "gemma3": Family(
        transformers.Gemma3TextConfig(**_GROUPED, head_dim=12, query_pre_attn_scalar=12, sliding_window=16),
        **_SANDWICH,
        hooked=dict(
            **_LOCAL,
            attn_types=["local", "local"],
            use_normalization_before_and_after=True,
            use_qk_norm=True,
            rotary_base_local=10_000,
        ),
    ),
    "olmo2": Family(
        transformers.Olmo2Config(**_SIZES),
        pre_norm=None,
        post_norm="post_feedforward_layernorm",
        convert="convert_olmo2_weights",
    ),
    "phi3": Family(
        transformers.Phi3Config(**_GROUPED),
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        convert="convert_phi3_weights",
    ),
    "mixtral": Family(
        transformers.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
        convert="convert_mixtral_weights",
        hooked=dict(num_experts=4, experts_per_token=2, norm_topk_prob=True, rotary_base=1_000_000),
    ),
}
DENSE = [name for name in FAMILIES if name != "mixtral"]


def sides(name: str) -> list[str]:
    """The sides that a family's neurons have."""
    return ["in", "gate", "out"] if FAMILIES[name].gate else ["in", "out"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 72 tokens, " dog" among them: the ids from 72 to 96 are padding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = "the dog saw a cat and the cat ran to the red house near the old sea with my dear friend Tom".split()
    trainer = trainers.BpeTrainer(vocab_size=N_TOKENS, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator([" ".join(words), " ".join(reversed(words))] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=N_CTX
    )
    fast.init_kwargs.update(name_or_path="tiny", add_bos_token=True)  # TransformerLens reads both
    assert len(fast) == N_TOKENS and len(fast.encode(" dog", add_special_tokens=False)) == 1
    return fast


@cache
def hf_model(name: str) -> PreTrainedModel:
    """The family's Hugging Face model: float32, every gain in 0.5 to 1.5, every bias random."""
    family = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(copy.deepcopy(family.config), attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]  # a bridge picks its adapter by this
    generator = torch.Generator().manual_seed(list(FAMILIES).index(name))
    for path, parameter in model.named_parameters():
        fresh = torch.empty_like(parameter)
        if parameter.ndim == 1 and path.endswith("weight"):
            fresh.uniform_(-0.5, 0.5, generator=generator).add_(0.0 if family.offset_gain else 1.0)
        else:
            fresh.normal_(std=0.3, generator=generator)
        parameter.data.copy_(fresh)
    sizes = (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size)
    assert sizes == (D_MODEL, N_LAYERS, D_VOCAB)
    return model


# Surfaces


def loaded_surfaces() -> list[str]:
    """Those that `load_model` makes with the installed TransformerLens."""
    return ["bridge"] * HAS_BRIDGE + ["hooked"] * HAS_HOOKED_TRANSFORMER


def surfaces() -> list[str]:
    """The surfaces that the installed TransformerLens offers, to every family.

    Version 4 has no HookedTransformer, version 2 no bridge.
    """
    hooked = ["hooked", "hooked-raw"] if HAS_HOOKED_TRANSFORMER else []
    bridges = ["bridge", "bridge-compat"] if HAS_BRIDGE else []
    return ["hf", *bridges, *hooked]


@cache
def build(name: str, surface: str):
    """The family's model on a surface, shared by the tests: they must leave it as they found it."""
    if surface == "hf":
        return hf_model(name)
    if surface.startswith("bridge"):
        if not HAS_BRIDGE:
            pytest.skip("TransformerLens 2 has no bridges")
        return _bridge(name, compatible=surface == "bridge-compat")
    return _hooked(name, processed=surface == "hooked")


def _bridge(name: str, compatible: bool):
    from transformer_lens.model_bridge import TransformerBridge

    hf = copy.deepcopy(hf_model(name))  # booting rewires the model that it is given
    model = TransformerBridge.boot_transformers(f"tiny/{name}", hf_model=hf, tokenizer=tokenizer(), device="cpu")
    if compatible:
        with warnings.catch_warnings():  # OLMo 2 and Phi-3 stay unfolded, which the tests must cope with too
            warnings.filterwarnings("ignore", ".* does not support fold_ln", UserWarning)
            model.enable_compatibility_mode(disable_warnings=True)
    return model


def _hooked(name: str, processed: bool):
    if TRANSFORMER_LENS < 3 and name in ("gemma3", "olmo2", "mixtral"):
        pytest.skip(f"TransformerLens 2 has no {name}")
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    family, hf = FAMILIES[name], hf_model(name)
    c = hf.config
    d_head = getattr(c, "head_dim", None) or D_MODEL // N_HEADS
    n_kv = getattr(c, "num_key_value_heads", N_HEADS)
    llama = dict(
        act_fn=family.act_fn,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        gated_mlp=family.gate is not None,
        n_key_value_heads=None if n_kv == N_HEADS else n_kv,
        eps=getattr(c, "rms_norm_eps", 1e-5),
    )
    cfg = HookedTransformerConfig(
        d_model=D_MODEL, d_head=d_head, n_heads=N_HEADS, d_mlp=D_MLP, n_layers=N_LAYERS, n_ctx=N_CTX, d_vocab=D_VOCAB,
        original_architecture=type(hf).__name__, device="cpu", init_weights=False, **(llama | family.hooked),
    )  # fmt: skip
    weights = getattr(weight_conversions, family.convert)(hf, cfg)
    weights = {key: value.detach().clone() for key, value in weights.items()}
    model = HookedTransformer(cfg, copy.deepcopy(tokenizer()), move_to_device=False)
    fold = processed and name != "olmo2"  # from_pretrained folds no norm that comes after what it would fold into
    model.load_and_process_state_dict(
        weights,
        fold_ln=fold,
        center_writing_weights=fold,
        center_unembed=processed and cfg.output_logits_soft_cap <= 0,  # nor does it centre under a softcap
        fold_value_biases=processed,
    )
    return model


# Truth


def copied(model):
    """A copy of a model that all tests share; a bridge that was run keeps a graph, which cannot be copied."""
    with differentiating(model):
        pass
    return copy.deepcopy(model)


def held_W_out(model, layer: int) -> Tensor:
    """A model's own W_out [d_mlp, d_model], to be changed in place."""
    if hasattr(model, "original_model"):
        return model.original_model.model.layers[layer].mlp.down_proj.weight.T
    return model.blocks[layer].mlp.W_out


@cache
def double(name: str) -> PreTrainedModel:
    """The Hugging Face model in float64, for truth alone."""
    return copy.deepcopy(hf_model(name)).double()


def unit(v: Tensor, centre: bool) -> Tensor:
    """Normalise plainly, with no gain: root mean square 1 (LayerNorm: of the centred v)."""
    v = v - v.mean(-1, keepdim=True) if centre else v
    return v / v.square().mean(-1, keepdim=True).sqrt()


@torch.no_grad()
def gain(norm: torch.nn.Module, centre: bool) -> Tensor:
    """What a norm multiplies each coordinate by, from its answers to v and -v.

    RMS norms work in float32 whatever they are given. On as many 1024s as -1024s they are exact: mean 0, mean
    square 2^20, and eps is lost beside it.
    """
    signs = torch.ones(D_MODEL, dtype=torch.float64)
    signs[torch.randperm(D_MODEL, generator=torch.Generator().manual_seed(0))[: D_MODEL // 2]] = -1
    v = 1024 * signs
    return (norm(v) - norm(-v)) / 2 / unit(v, centre)


@torch.no_grad()
def matrix(linear: torch.nn.Module) -> Tensor:
    """The matrix [output, input] that a linear map applies, however it stores it."""
    n_in = linear.in_features if isinstance(linear, torch.nn.Linear) else linear.nx  # GPT-2's Conv1D
    eye = torch.eye(n_in, dtype=torch.float64)
    return (linear(eye) - linear(torch.zeros_like(eye))).T


def part(name: str, path: str | None, layer: int | None = None) -> torch.nn.Module | None:
    """A module of the float64 model by its path, within a layer where one is given."""
    if path is None:
        return None
    prefix = "" if layer is None else f"{FAMILIES[name].layers}.{layer}."
    return double(name).get_submodule(prefix + path)


def literal(name: str, layer: int, side: str) -> Tensor:
    """The weights of a layer's neurons as the model holds them, float64 [d_mlp, d_model]."""
    family = FAMILIES[name]
    if side == "out":
        return matrix(part(name, family.down, layer)).T
    rows = matrix(part(name, family.up if side == "in" else family.gate, layer))
    if family.up == family.gate:
        rows = rows.chunk(2)[side == "in"]  # one map for both, the gate first
    return rows


def direction(name: str, layer: int, side: str) -> Tensor:
    """The true directions of a layer's neurons in the residual stream, float64 [d_mlp, d_model]."""
    family = FAMILIES[name]
    x = literal(name, layer, side)
    norm = part(name, family.post_norm if side == "out" else family.pre_norm, layer)
    if norm is not None:
        x = x * gain(norm, family.layer_norm)
    return x - x.mean(-1, keepdim=True) if family.layer_norm else x


def literal_unembedding(name: str) -> Tensor:
    """W_U as the model holds it, float64 [d_model, d_vocab]."""
    return matrix(double(name).get_output_embeddings()).T


def unembedding(name: str) -> Tensor:
    """The true W_U', float64 [d_model, d_vocab]: the final norm's gain folded in (LayerNorm: and centred)."""
    family = FAMILIES[name]
    W_U = gain(part(name, family.final_norm), family.layer_norm)[:, None] * literal_unembedding(name)
    return W_U - W_U.mean(0) if family.layer_norm else W_U
