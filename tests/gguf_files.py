"""Tiny models written in GGUF as llama.cpp's converter writes them, with their models for truth."""

from __future__ import annotations

import json
import re

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM
from transformers.integrations import ggml

from tests import families

D_MODEL, D_MLP, N_LAYERS, D_VOCAB = 64, 96, 2, 72
_SIZES = dict(
    vocab_size=D_VOCAB,
    hidden_size=D_MODEL,
    intermediate_size=D_MLP,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
_GPT = dict(vocab_size=D_VOCAB, n_embd=D_MODEL, n_inner=4 * D_MODEL, n_layer=N_LAYERS, n_head=4, n_positions=64)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**_SIZES),
    "starcoder2": lambda: transformers.Starcoder2Config(**_SIZES),
    "stablelm": lambda: transformers.StableLmConfig(**_SIZES, use_qkv_bias=True),
    "nemotron": lambda: transformers.NemotronConfig(**_SIZES, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(**_GPT),
    "qwen3moe": lambda: transformers.Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=16),
    "qwen2moe": lambda: transformers.Qwen2MoeConfig(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=64),
}
_MODEL_TYPES = {"qwen3moe": "qwen3_moe", "qwen2moe": "qwen2_moe" if families.STACKS_EXPERTS else "qwen2moe"}
_PLUS_ONE = ("gemma2", "gemma3", "nemotron")


def model(arch, tied=True):
    """A random model whose config is what its file says."""
    config = CONFIGS[arch]()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(std=0.3)
    return made


def tensors(arch, hf):
    """A model's tensors as llama.cpp names and keeps them."""
    known = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(known, N_LAYERS)
    found = {}
    for name, tensor in _with_stacks(hf.state_dict()).items():
        if name == "lm_head.weight" and hf.config.tie_word_embeddings:
            continue
        stem, suffix = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "weight")
        block = re.match(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj", name)
        if block:
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                found[f"blk.{block[1]}.ffn_{part}_exps.weight"] = half
            continue
        if arch == "gpt2" and re.search(r"\.(c_attn|c_fc|c_proj)\.weight", name):
            tensor = tensor.T
        if arch in _PLUS_ONE and name.endswith("norm.weight"):
            tensor = tensor + 1
        found[f"{names.get_name(stem)}.{suffix}"] = tensor
    return {name: tensor.float().contiguous().numpy() for name, tensor in found.items()}


def _with_stacks(state):
    """A state dict whose experts are stacked, as llama.cpp has them, also where transformers 4 keeps them in lists."""
    stacks, others = {}, {}
    for name, tensor in state.items():
        own = re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.\d+\.(\w+)\.weight", name)
        if own is None:
            others[name] = tensor
        else:
            stacks.setdefault(f"{own[1]}.{own[2]}", []).append(tensor)
    return others | {name: torch.stack(tensors) for name, tensors in stacks.items()}


def fields(arch, hf):
    """What the header says: the config by the names that transformers reads it by."""
    renamed = ggml.GGUF_CONFIG_MAPPING[_MODEL_TYPES.get(arch, arch)]
    found = {}
    for key, own in renamed.items():
        value = getattr(hf.config, own, None) if own not in (None, -1) else None
        if isinstance(value, int | float):
            found[f"{arch}.{key}"] = value
    if "rope.freq_base" in renamed:
        found[f"{arch}.rope.freq_base"] = 10000.0
    return found


def write(path, arch, arrays, own, kind=Kind.F32, tokenizer=None, split=None):
    """Write a file: matrices of a kind, all else in float32; the tokenizer's words, and which part of how many."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_pad_token_id(1)
    for key, value in own.items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_float32(key, value)
    if split is not None:
        for key, value in zip(("no", "count"), split, strict=True):
            writer.add_uint16(f"split.{key}", value)
    if tokenizer is not None:
        words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(words)
        writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
        writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(1)
    for name, array in arrays.items():
        matrix = array.ndim > 1 and name.endswith("weight")
        if matrix and kind is not Kind.F32:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def dequantised(hf, arch, kind):
    """The same model with the matrices that its file holds, whatever they were rounded to."""
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim > 1:
                turned = arch == "gpt2" and re.search(r"\.(c_attn|c_fc|c_proj)\.weight", name)
                array = (parameter.T if turned else parameter).contiguous().numpy()
                numbers = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind))
                parameter.copy_(numbers.T if turned else numbers)
    return hf
