"""Tiny models packed by hand in safetensors, each format after its description, and the same models dequantised.

A packer takes a name and a matrix and gives the tensors that hold it, and the numbers that these stand for, in float64.
"""

from __future__ import annotations

import json
import re
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import gguf_files
from tl_flash.weights.formats.quantised import E2M1

GROUP = 16
_MATRICES = r".*\.layers\..*_proj(\.weight)?"


def gpt_oss():
    """A mixture of experts whose gate and up take turns."""
    sizes = gguf_files._SIZES | dict(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**sizes, head_dim=16, sliding_window=16)
    made = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(std=0.3)
    return made


def model(arch):
    return gpt_oss() if arch == "gpt_oss" else gguf_files.model(arch, tied=False)


def write(folder, hf, pack, quantisation, matrices=_MATRICES, tokenizer=None):
    """A quantised folder, and one beside it with the numbers that it stands for."""
    packed, plain = folder / "packed", folder / "plain"
    hf.save_pretrained(plain)
    if tokenizer is not None:
        tokenizer.save_pretrained(plain)
    shutil.copytree(plain, packed)
    given, tensors, numbers = load_file(plain / "model.safetensors"), {}, {}
    for name, tensor in given.items():
        if re.fullmatch(matrices, name):
            parts, truth = pack(name, tensor)
            assert truth.dtype == torch.float64
            tensors |= parts
            numbers[name] = truth.float()
        else:
            tensors[name] = numbers[name] = tensor
    save(packed, tensors)
    save(plain, numbers)
    configure(packed, quantization_config=quantisation)
    return packed, plain


def save(folder, tensors):
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change(folder, changes):
    """Other tensors in a folder: by name a tensor, or None for one that is left out."""
    tensors = load_file(folder / "model.safetensors") | changes
    save(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def blocks(tensor, high, wide):
    """One number for each block of a matrix, from its largest, and the same for each of its numbers."""
    *stack, rows, columns = tensor.shape
    padded = torch.nn.functional.pad(tensor, (0, -columns % wide, 0, -rows % high)).abs()
    largest = padded.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).amax((-3, -1))
    return largest, lambda values: (
        values.repeat_interleave(high, -2).repeat_interleave(wide, -1)[..., :rows, :columns].double()
    )


# FP8


def fp8(high, wide, scale_name="weight_scale_inv", dtype=torch.float8_e4m3fn, scales=torch.float32, shape=None):
    def pack(name, tensor):
        largest, spread = blocks(tensor, high, wide)
        scale = (largest / torch.finfo(dtype).max).to(scales)
        packed = (tensor / spread(scale.float())).to(dtype)
        held = name.removesuffix("weight") + scale_name if name.endswith("weight") else f"{name}_scale_inv"
        truth = packed.double() * spread(scale.float())
        return {name: packed, held: scale if shape is None else scale.reshape(shape)}, truth

    return pack


def four_bits(tensor, scale):
    """The bits of the four-bit floats that are next to what a tensor is scaled by."""
    values = torch.tensor(E2M1, dtype=torch.float64)
    return (tensor.double() / scale)[..., None].sub(values).abs().argmin(-1)


def nibbles(bits):
    """Two of them a byte, the first in the lower half."""
    return (bits[..., ::2] | bits[..., 1::2] << 4).to(torch.uint8)


def fp8_experts_in_four_bits(name, tensor):
    """Experts as DeepSeek V4 packs them: int8 of two floats, exponents for every 32."""
    largest, spread = blocks(tensor, 1, 32)
    exponent = (largest / 6).log2().ceil()
    bits = four_bits(tensor, spread(exponent.exp2()))
    truth = torch.tensor(E2M1, dtype=torch.float64)[bits] * spread(exponent.exp2())
    scale = exponent.exp2().to(torch.float8_e8m0fnu)
    return {name: nibbles(bits).view(torch.int8), name.removesuffix("weight") + "scale": scale}, truth


# MXFP4


def mxfp4(name, tensor):
    """A stack [expert, input, output] as gpt-oss packs it."""
    rows = tensor.mT
    largest, spread = blocks(rows, 1, 32)
    exponent = (largest / 6).log2().ceil()
    bits = four_bits(rows, spread(exponent.exp2()))
    truth = torch.tensor(E2M1, dtype=torch.float64)[bits] * spread(exponent.exp2())
    packed = nibbles(bits).unflatten(-1, (-1, 16))
    return {f"{name}_blocks": packed, f"{name}_scales": (exponent + 127).to(torch.uint8)}, truth.mT
