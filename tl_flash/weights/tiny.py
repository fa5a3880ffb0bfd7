"""Tiny models of a config's class: as many layers of the same kinds, a few dimensions wide, of random weights.

What a layout is found on. Widths, heads, experts and tokens are made few; whatever tells one layer from another stays.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

D_MODEL, D_MLP, D_EXPERT, D_HEAD, N_HEADS, N_EXPERTS, D_VOCAB = 64, 40, 24, 16, 4, 4, 120
WIDER = 2
"""How many times wider the second tiny model is, where something may depend on the width."""

_WIDTHS = """hidden_size n_embd d_model dim_model emb_dim embedding_dim embedding_size backbone_hidden_size
    hidden_size_per_head""".split()
_AS_WIDE = "word_embed_proj_dim lru_width attention_hidden_size cross_attention_hidden_size n_embed".split()
_NEURONS = """intermediate_size n_inner ffn_dim d_ff dim_ff dff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_inner
    dense_intermediate_size feed_forward_size intermediate_size_mlp mlp_dim""".split()
_EXPERT_NEURONS = "moe_intermediate_size expert_ffn_hidden_size expert_ffn_size".split()
_SHARED_NEURONS = """shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size
    shared_experts_intermediate_size""".split()
_HEADS = """num_attention_heads n_head n_heads num_heads num_key_value_heads num_kv_heads kv_n_heads attention_heads
    encoder_attention_heads decoder_attention_heads num_query_groups num_attention_heads_per_layer linear_num_heads
    swa_num_attention_heads swa_num_key_value_heads num_encoder_attention_heads num_decoder_attention_heads
    linear_num_key_heads linear_num_value_heads num_global_key_value_heads global_num_key_value_heads""".split()
_HEAD_SIZES = """head_dim d_kv kv_channels d_head dim_head v_head_dim qk_head_dim linear_key_head_dim
    linear_value_head_dim linear_head_dim swa_head_dim attention_head_size global_head_dim index_head_dim""".split()
_EXPERTS = """num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num""".split()
_CHOSEN = """num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts experts_per_token
    expert_capacity""".split()
_GROUPS = "n_group topk_group num_expert_group".split()
_FEW = {
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "o_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    "index_n_heads": 2,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "mamba_d_state": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_chunk_size": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "seq_length": 64,
    "max_target_positions": 64,
    "laurel_rank": 8,
    "hidden_size_per_layer_input": 12,
    "router_hidden_size": 8,
    "adapter_rank": 4,
    "hc_lowrank": 8,
    "gated_norm_rank": 4,
}
_TOWERS = "vision_config audio_config".split()
_DEPTHS = "depth depths num_hidden_layers num_layers encoder_layers".split()
_ROTARY = "default linear dynamic yarn longrope llama3 proportional mrope".split()
_MAMBA_HEADS = "mamba_n_heads mamba_num_heads n_mamba_heads".split()
_MAMBA_HEAD_SIZES = "mamba_d_head mamba_head_dim mamba_headdim".split()


def tiny_config(config: Any, *, wider: int = 1) -> Any:
    """The same config with few dimensions, heads, experts and tokens; layers and their kinds are kept.

    Args:
        config: a Hugging Face config, left as it is.
        wider: multiplies the width of the residual stream.
    """
    small = copy.deepcopy(config)
    _shrink(small, wider)
    return small


def tiny_model(model_class: type, config: Any) -> Any:
    """A model of a tiny config, made ready to be traced."""
    with torch.random.fork_rng(devices=[]):
        return randomised(model_class(config))


def randomised(model: Any, seed: int = 0) -> Any:
    """A model in float64 whose every parameter is random, so that no two tensors are alike.

    It has learnt nothing, so that scores over 0 and 1 are spread evenly and streams are about as long as norms expect.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.cpu().double().eval().requires_grad_()
    for config in {id(c): c for module in model.modules() if (c := getattr(module, "config", None))}.values():
        config._attn_implementation = config._experts_implementation = "eager"  # others know no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 1.0 if "embed" in name or parameter.shape[0] == D_VOCAB else 0.2
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=std, generator=generator)
    return model


def _shrink(config: Any, wider: int) -> None:
    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    heads = next((given[name] for name in _HEADS[:4] if isinstance(given.get(name), int)), 0)
    width = next((given[name] for name in _WIDTHS if isinstance(given.get(name), int)), 0)
    expert = next((given[name] for name in _EXPERT_NEURONS if isinstance(given.get(name), int)), None)
    rope = given.get("qk_rope_head_dim")
    for name, value in given.items():
        if hasattr(value, "to_dict"):
            _shrink(value, wider)
            if name in _TOWERS:
                _flatten(value)
        elif name == "use_mamba_kernels":
            config.use_mamba_kernels = False  # they need a GPU
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            setattr(config, name, _plain_rotary(value))
        elif value is not None and not isinstance(value, bool):
            new = _each(value, lambda one, name=name: _few(name, one, heads, width, expert, rope, wider))
            if new is not value:
                setattr(config, name, new)


def _flatten(tower: Any) -> None:
    """Leave one layer of a tower for images or sound, through which no token ids pass."""
    kinds = getattr(tower, "layer_types", None)
    if kinds:
        tower.layer_types = kinds[:1]
    for name in _DEPTHS:
        if getattr(tower, name, None):
            setattr(tower, name, _each(getattr(tower, name), lambda depth: min(depth, 1)))


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, int):
        return change(value)
    if isinstance(value, list | tuple) and value and all(isinstance(one, int) for one in value):
        return type(value)(map(change, value))
    return value


def _few(name: str, value: int, heads: int, width: int, expert: int | None, rope: int | None, wider: int) -> int:
    """What stands for an entry of a config in the tiny one."""
    if isinstance(value, bool) or value == 0:
        return value
    if name.endswith("token_id") or name == "padding_idx":
        return 1
    if "vocab_size" in name and name != "type_vocab_size":
        return D_VOCAB
    if name in _WIDTHS or (name in _AS_WIDE and value == width):
        return D_MODEL * wider
    if name in _AS_WIDE:
        return D_MODEL * wider * value // width if width else D_MODEL * wider // 2
    if name in _NEURONS:
        return D_MLP
    if name in _EXPERT_NEURONS:
        return D_EXPERT
    if name in _SHARED_NEURONS:
        return D_EXPERT * (value // expert if expert and value % expert == 0 else 1)
    if name in _HEADS:
        return _heads(value, heads)
    if name in _HEAD_SIZES:
        return _FEW["qk_rope_head_dim"] if name == "head_dim" and value == rope else D_HEAD
    if name in _EXPERTS:
        return min(value, N_EXPERTS)
    if name in _CHOSEN:
        return min(value, 2)
    if name in _GROUPS:
        return 1
    if name in _MAMBA_HEADS:
        return 8
    if name in _MAMBA_HEAD_SIZES:
        return D_MODEL * wider * 2 // 8
    if name == "mamba_d_ssm":
        return D_MODEL * wider * 2
    return min(value, _FEW.get(name, value))


def _heads(value: int, heads: int) -> int:
    if value >= heads or not heads:
        return N_HEADS
    return max(value * N_HEADS // heads, 1)


def _plain_rotary(rotary: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings without what depends on widths: positions say nothing of a layout."""
    if any(isinstance(value, dict) for value in rotary.values()):
        return {kind: _plain_rotary(value) if isinstance(value, dict) else value for kind, value in rotary.items()}
    kind = rotary.get("rope_type", rotary.get("type"))
    if kind not in _ROTARY or (kind == "yarn" and "partial_rotary_factor" in rotary):  # the plain one may not know it
        return rotary
    kept = {name: value for name, value in rotary.items() if not isinstance(value, list)}
    if "mrope_section" in rotary:
        kept["mrope_section"] = _thirds(int(D_HEAD * rotary.get("partial_rotary_factor", 1)) // 2)
    return {"rope_theta": 10_000.0} | kept | {"rope_type": "default"}


def _thirds(n: int) -> list[int]:
    return [n - 2 * (n // 3), n // 3, n // 3]


def token_ids() -> Any:
    """The tokens that a model is run on to be watched."""
    return torch.arange(4)[None] + 11
