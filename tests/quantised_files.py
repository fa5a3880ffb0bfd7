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
EXPONENTS = getattr(torch, "float8_e8m0fnu", torch.float32)  # since torch 2.7
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
    return (
        largest,
        lambda values: values.repeat_interleave(high, -2).repeat_interleave(wide, -1)[..., :rows, :columns].double(),
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
    scale = exponent.exp2().to(EXPONENTS)
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


# Whole numbers


def affine(tensor, bits, group_of):
    """Numbers [outputs, inputs] of so many bits: q, and a scale in half precision and a zero point for each group.

    With `group_of` for each input which group it is in.
    """
    n_groups = int(group_of.max()) + 1
    low, high = (
        torch.stack([edge(tensor[:, group_of == group], 1) for group in range(n_groups)], 1)
        for edge in (torch.amin, torch.amax)
    )
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(1, 2**bits - 1).long()
    whole = (tensor / scale.float()[:, group_of]).round().long() + zero[:, group_of]
    whole = whole.clamp(0, 2**bits - 1)
    truth = scale.double()[:, group_of] * (whole - zero[:, group_of]).double()
    return whole, scale, zero, truth


def words(whole, bits):
    """Whole numbers along the last axis as one string of bits, the lowest first, cut into int32."""
    *first, n = whole.shape
    each = (whole[..., None] >> torch.arange(bits) & 1).reshape(*first, n * bits)
    return signed((each.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1))


def signed(word):
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def groups_of(n_inputs, group, in_order):
    """Of every input; all are of one where there is no group size."""
    group_of = torch.arange(n_inputs) // (group or n_inputs)
    return group_of if in_order else group_of[torch.randperm(n_inputs, generator=torch.Generator().manual_seed(0))]


def gptq(bits, version=1, in_order=True, group=GROUP, with_groups=True):
    def pack(name, tensor):
        group_of = groups_of(tensor.shape[1], group, in_order)
        whole, scale, zero, truth = affine(tensor, bits, group_of)
        stem = name.removesuffix(".weight")
        parts = {
            f"{stem}.qweight": words(whole, bits).T,
            f"{stem}.qzeros": words(zero.T - int(version == 1), bits),
            f"{stem}.scales": scale.T,
        }
        if with_groups:
            parts[f"{stem}.g_idx"] = group_of.int()
        return parts, truth

    return pack


def awq(name, tensor):
    whole, scale, zero, truth = affine(tensor, 4, torch.arange(tensor.shape[1]) // GROUP)
    stem = name.removesuffix(".weight")

    def packed(numbers):
        columns = numbers.unflatten(-1, (-1, 8))
        return signed(sum(columns[..., column] << 4 * at for at, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7])))

    return {f"{stem}.qweight": packed(whole.T), f"{stem}.qzeros": packed(zero.T), f"{stem}.scales": scale.T}, truth


# compressed-tensors


def packed_integers(bits, group=GROUP, symmetric=True, in_order=True):
    """`pack-quantized`; a symmetric one has no zero points."""

    def pack(name, tensor):
        group_of = groups_of(tensor.shape[1], group, in_order)
        whole, scale, zero, truth = affine(tensor, bits, group_of)
        parts = {f"{name}_shape": torch.tensor(tensor.shape), f"{name}_packed": words(whole, bits)}
        if symmetric:
            truth = scale.double()[:, group_of] * (whole - 2 ** (bits - 1)).double()
        else:
            parts[f"{name}_zero_point"] = words(zero.T, bits).T
        if not in_order:
            parts[f"{name}_g_idx"] = group_of.int()
        return parts | {f"{name}_scale": scale}, truth

    return pack


def integers(symmetric):
    """`int-quantized`, a row a scale."""

    def pack(name, tensor):
        whole, scale, zero, truth = affine(tensor, 8, torch.zeros(tensor.shape[1], dtype=torch.long))
        parts = {name: (whole - 128).to(torch.int8), f"{name}_scale": scale}
        if symmetric:
            return parts, scale.double() * (whole - 128).double()
        return parts | {f"{name}_zero_point": (zero - 128).to(torch.int8)}, truth

    return pack


def nvfp4(name, tensor):
    largest, spread = blocks(tensor, 1, 16)
    over = (448 * 6 / tensor.abs().max()).reshape(1)
    scale = (largest / 6 * over).to(torch.float8_e4m3fn)
    by = spread(scale.float() / over).double()
    bits = four_bits(tensor, by)
    parts = {f"{name}_packed": nibbles(bits), f"{name}_scale": scale, f"{name}_global_scale": over}
    return parts, torch.tensor(E2M1, dtype=torch.float64)[bits] * by


def exponents(floats):
    """`mxfp4-pack-quantized` or `mxfp8-quantized`: groups of 32 with an exponent."""

    def pack(name, tensor):
        largest, spread = blocks(tensor, 1, 32)
        exponent = (largest / (6 if floats == 4 else 448)).log2().ceil()
        by, scale = spread(exponent.exp2()), (exponent + 127).to(torch.uint8)
        if floats == 8:
            packed = (tensor / by).to(torch.float8_e4m3fn)
            return {name: packed, f"{name}_scale": scale}, packed.double() * by
        bits = four_bits(tensor, by)
        truth = torch.tensor(E2M1, dtype=torch.float64)[bits] * by
        return {f"{name}_packed": nibbles(bits), f"{name}_scale": scale}, truth

    return pack


def compressed(form, bits, kind="int", **scheme):
    """What config.json says of it."""
    weights = dict(num_bits=bits, type=kind, symmetric=True, dynamic=False) | scheme
    group = dict(targets=["Linear"], weights=weights)
    return dict(quant_method="compressed-tensors", format=form, config_groups={"group_0": group}, ignore=["lm_head"])


# bitsandbytes

NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
       0.7230, 1.0]  # fmt: skip


def four_bit_table(size=64, nested=None, kind="nf4"):
    """A four-bit table, whose scales may be bytes of a table of their own."""

    def pack(name, tensor):
        table, flat = torch.tensor(NF4), tensor.flatten()
        runs = torch.nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
        scale = runs.abs().amax(1)
        state = dict(quant_type=kind, blocksize=size, dtype="float32", shape=list(tensor.shape))
        parts, truth = {f"{name}.absmax": scale, f"{name}.quant_map": table}, scale.double()
        if nested:
            offset, places = float(scale.mean()), torch.linspace(-1, 1, 256)
            groups = torch.nn.functional.pad(scale - offset, (0, -len(scale) % nested)).reshape(-1, nested)
            over = groups.abs().amax(1)
            at = (groups / over[:, None])[..., None].sub(places).abs().argmin(-1)
            state |= dict(nested_blocksize=nested, nested_offset=offset, nested_dtype="float32")
            bytes_ = at.flatten()[: len(scale)].to(torch.uint8)
            parts |= {f"{name}.absmax": bytes_, f"{name}.nested_absmax": over, f"{name}.nested_quant_map": places}
            truth = (places[at] * over[:, None] + offset).flatten()[: len(scale)].double()
        bits = (runs / truth[:, None]).clamp(-1, 1)[..., None].sub(table).abs().argmin(-1).flatten()[: len(flat)]
        packed = (bits[::2] << 4 | bits[1::2]).to(torch.uint8)[:, None]
        held = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
        numbers = table.double()[bits] * truth.repeat_interleave(size)[: len(flat)]
        parts |= {name: packed, f"{name}.quant_state.bitsandbytes__{kind}": held}
        return parts, numbers.reshape(tensor.shape)

    return pack


def int8(name, tensor):
    scale = tensor.abs().amax(1)
    whole = (tensor / scale[:, None] * 127).round().to(torch.int8)
    stem = name.removesuffix(".weight")
    parts = {name: whole, f"{stem}.SCB": scale, f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, (whole * scale[:, None] * 7.874015718698502e-3).double()
