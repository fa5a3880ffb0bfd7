"""Maps of quantised safetensors equal those of the numbers that they stand for; what does not fit is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import families, quantised_files
from tests.quantised_files import compressed, configure
from tl_flash import compare, decode_to_file, flash_decode, load_model
from tl_flash.cli import main
from tl_flash.decode import job
from tl_flash.weights import layout, read, read_unembedding
from tl_flash.weights.formats import bitsandbytes, compressed_tensors, gptq
from tl_flash.weights.formats import packed as boxes
from tl_flash.weights.formats.mxfp4 import MXFP4 as MXFP4Format

K = 4
FP8 = dict(quant_method="fp8", weight_block_size=[32, 32])
MXFP4 = dict(quant_method="mxfp4")
GPTQ = dict(quant_method="gptq", bits=4, group_size=quantised_files.GROUP)
AWQ = dict(quant_method="awq", bits=4, group_size=quantised_files.GROUP, zero_point=True, version="gemm")
BNB = dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
IN_EXPERTS = r".*\.experts\.(gate_up|down)_proj"

CASES = {
    "fp8 blocks": ("llama", quantised_files.fp8(32, 32), FP8, "FP8"),
    "fp8 ragged blocks": ("llama", quantised_files.fp8(40, 40), FP8 | dict(weight_block_size=[40, 40]), "FP8"),
    "fp8 half-precision scales": ("llama", quantised_files.fp8(32, 32, scales=torch.bfloat16), FP8, "FP8"),
    "fp8 exponents": ("llama", quantised_files.fp8(32, 32, scales=quantised_files.EXPONENTS), FP8, "FP8"),
    "fp8 per tensor": (
        "llama",
        quantised_files.fp8(999, 999, shape=()),
        FP8 | dict(weight_block_size=None),
        "FP8",
    ),
    "fp8 of vLLM": (
        "llama",
        quantised_files.fp8(999, 999, "weight_scale", torch.float8_e5m2, shape=(1,)),
        dict(quant_method="fp8", activation_scheme="static"),
        "FP8",
    ),
    "fp8 per row": ("llama", quantised_files.fp8(1, 999, "weight_scale"), dict(quant_method="fbgemm_fp8"), "FP8"),
    "fp8 in a fused MLP": ("phi3", quantised_files.fp8(32, 32), FP8, "FP8"),
    "fp8 experts": ("qwen3moe", quantised_files.fp8(32, 32), FP8, "FP8"),
    "fp8 experts in a stack": ("gpt_oss", quantised_files.fp8(32, 32), FP8, "FP8"),
    "fp8 in four bits": ("qwen3moe", quantised_files.fp8_experts_in_four_bits, FP8, "FP8"),
    "mxfp4": ("gpt_oss", quantised_files.mxfp4, MXFP4, "MXFP4"),
    **{
        f"gptq int{bits}": ("llama", quantised_files.gptq(bits), GPTQ | dict(bits=bits), f"GPTQ int{bits}")
        for bits in (2, 3, 4, 8)
    },
    "gptq v2": (
        "llama",
        quantised_files.gptq(4, version=2),
        GPTQ | dict(checkpoint_format="gptq_v2"),
        "GPTQ int4",
    ),
    "gptq desc_act": ("llama", quantised_files.gptq(4, in_order=False), GPTQ | dict(desc_act=True), "GPTQ int4"),
    "gptq without groups": (
        "llama",
        quantised_files.gptq(4, group=None, with_groups=False),
        GPTQ | dict(group_size=-1),
        "GPTQ int4",
    ),
    "gptq experts": ("qwen3moe", quantised_files.gptq(4), GPTQ, "GPTQ int4"),
    "awq": ("llama", quantised_files.awq, AWQ, "AWQ int4"),
    "awq fused": ("phi3", quantised_files.awq, AWQ, "AWQ int4"),
    **{
        f"packed int{bits}": (
            "llama",
            quantised_files.packed_integers(bits),
            compressed("pack-quantized", bits, group_size=16),
            f"compressed-tensors int{bits}",
        )
        for bits in (2, 4, 8)
    },
    "packed int4 with zeros": (
        "llama",
        quantised_files.packed_integers(4, symmetric=False),
        compressed("pack-quantized", 4, symmetric=False, group_size=16),
        "compressed-tensors int4",
    ),
    "packed int4 a row": (
        "qwen3moe",
        quantised_files.packed_integers(4, group=None),
        compressed("pack-quantized", 4),
        "compressed-tensors int4",
    ),
    "packed int4 in no order": (
        "llama",
        quantised_files.packed_integers(4, in_order=False),
        compressed("pack-quantized", 4, actorder="group", group_size=16),
        "compressed-tensors int4",
    ),
    "int8": ("llama", quantised_files.integers(True), compressed("int-quantized", 8), "compressed-tensors int8"),
    "int8 with zeros": (
        "llama",
        quantised_files.integers(False),
        compressed("naive-quantized", 8),
        "compressed-tensors int8",
    ),
    "compressed fp8": (
        "llama",
        quantised_files.fp8(1, 999, "weight_scale"),
        compressed("float-quantized", 8, "float"),
        "compressed-tensors FP8",
    ),
    "compressed fp8 blocks": (
        "llama",
        quantised_files.fp8(40, 40, "weight_scale"),
        compressed("float-quantized", 8, "float", block_structure=[40, 40]),
        "compressed-tensors FP8",
    ),
    "nvfp4": (
        "llama",
        quantised_files.nvfp4,
        compressed("nvfp4-pack-quantized", 4, "float"),
        "compressed-tensors NVFP4",
    ),
    "compressed mxfp4": (
        "llama",
        quantised_files.exponents(4),
        compressed("mxfp4-pack-quantized", 4, "float"),
        "compressed-tensors MXFP4",
    ),
    "mxfp8": (
        "llama",
        quantised_files.exponents(8),
        compressed("mxfp8-quantized", 8, "float", group_size=32),
        "compressed-tensors FP8",
    ),
    "nf4": ("llama", quantised_files.four_bit_table(), BNB, "bitsandbytes NF4"),
    "nf4 in runs over rows": ("llama", quantised_files.four_bit_table(40), BNB, "bitsandbytes NF4"),
    "nf4 of nested scales": ("phi3", quantised_files.four_bit_table(64, 36), BNB, "bitsandbytes NF4"),
    "bitsandbytes int8": (
        "llama",
        quantised_files.int8,
        dict(load_in_8bit=True, quant_method="bitsandbytes"),
        "bitsandbytes int8",
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A case's folders, quantised and dequantised, shared by the tests."""
    made = {}

    def written(name):
        if name not in made:
            arch, pack, quantisation, _ = CASES[name]
            only = dict(matrices=IN_EXPERTS) if arch == "gpt_oss" else {}
            hf = quantised_files.model(arch)
            folder = tmp_path_factory.mktemp("quantised")
            made[name] = quantised_files.write(folder, hf, pack, quantisation, tokenizer=families.tokenizer(), **only)
        return made[name]

    return written


def assert_alike(given, expected):
    assert torch.equal(given.positive.ids, expected.positive.ids)
    assert torch.equal(given.negative.ids, expected.negative.ids)
    for name in ("logits", "log_z", "write_z"):
        assert torch.equal(getattr(given.positive, name), getattr(expected.positive, name)), name
    assert (given.n_layers, given.n_experts, given.d_mlp) == (expected.n_layers, expected.n_experts, expected.d_mlp)


# The numbers


@pytest.mark.parametrize("name", CASES)
def test_a_quantised_folder_gives_the_map_of_its_numbers(written, name, monkeypatch):
    monkeypatch.setattr(boxes, "_AT_ONCE", 700)
    monkeypatch.setattr(job, "BLOCK", 20)
    folder, plain = written(name)
    for side in ("in", "gate", "out"):
        assert torch.equal(read(folder).directions(1, side), read(plain).directions(1, side)), side
        some = slice(7, 30)
        assert torch.equal(read(folder).directions(1, side, neurons=some), read(plain).directions(1, side)[some])
    given, expected = flash_decode(folder, k=K), flash_decode(plain, k=K)
    assert_alike(given, expected)
    assert given.source.stored == CASES[name][-1] and expected.source.stored is None


@pytest.mark.parametrize("name", ["fp8 blocks", "fp8 half-precision scales", "fp8 exponents", "mxfp4"])
def test_the_numbers_are_those_of_transformers(written, name):
    if name.startswith("fp8") and not families.STACKS_EXPERTS:
        pytest.skip("transformers 4 dequantises no FP8")
    folder, _ = written(name)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for side in ("in", "gate", "out"):
        assert torch.equal(read(folder).directions(1, side), read(hf).directions(1, side)), side


def test_mxfp4_is_what_transformers_makes_of_every_byte():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 5, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(1, 250, (2, 5, 3), dtype=torch.uint8, generator=generator)
    stored = MXFP4Format({}).stored({"blocks": blocks, "scales": scales})
    given = stored.unpack(slice(0, 10), slice(0, 96)).reshape(2, 5, 96).mT
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert stored.held == expected.shape and torch.equal(given, expected)


# As a map says it, and as a model


def test_a_map_says_how_its_model_was_quantised(written, tmp_path):
    maps = [flash_decode(source, k=K) for name in ("nf4", "awq") for source in written(name)]
    assert "across quantisations (bitsandbytes NF4 against float32)" in repr(compare(maps[0], maps[1]))
    assert "across quantisations (bitsandbytes NF4 against AWQ int4)" in repr(compare(maps[0], maps[2]))
    assert "across" not in repr(compare(maps[0], maps[0]))
    maps[0].save(tmp_path / "map.safetensors")
    assert type(maps[0]).load(tmp_path / "map.safetensors").source.stored == "bitsandbytes NF4"


def test_the_command_line_and_a_decode_to_a_file(written, tmp_path, capsys):
    folder, _ = written("gptq int4")
    assert main(["decode", str(folder), "-o", str(tmp_path / "a.safetensors"), "-k", "3"]) == 0
    decode_to_file(folder, tmp_path / "b.safetensors", k=3)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert main(["find", str(folder), "dog", "-n", "2"]) == 0 and "'dog'" in capsys.readouterr().out


@pytest.mark.parametrize("surface", families.loaded_surfaces())
@pytest.mark.parametrize("name", ["fp8 blocks", "gptq int4", "awq", "packed int4", "nf4", "bitsandbytes int8"])
def test_a_quantised_folder_is_loaded_to_clamp(written, name, surface):
    folder, plain = written(name)
    model, expected = load_model(folder, surface=surface), load_model(plain, surface=surface)
    ids = torch.randint(72, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids), expected(ids))
    assert_alike(flash_decode(model, k=K), flash_decode(expected, k=K))
    assert model.cfg.dtype is torch.float32 and model.tokenizer is not None


@pytest.mark.parametrize("name", ["fp8 experts", "mxfp4"])
def test_experts_are_loaded_whole(written, name):
    if not families.HAS_BRIDGE:
        pytest.skip("TransformerLens 2 has no bridges")
    folder, plain = written(name)
    given, expected = (load_model(source, dtype="bfloat16").original_model.state_dict() for source in (folder, plain))
    assert given.keys() == expected.keys() and all(torch.equal(given[name], expected[name]) for name in given)


def test_parts_may_be_in_files_of_their_own(written, tmp_path):
    folder, plain = written("nf4 of nested scales")
    shutil.copytree(folder, tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "x" / "model.safetensors").unlink()
    where = {name: f"model-{at % 3}.safetensors" for at, name in enumerate(sorted(tensors))}
    for file in {*where.values()}:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, tmp_path / "x" / file)
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_alike(flash_decode(tmp_path / "x", k=K), flash_decode(plain, k=K))


def test_an_unembedding_may_be_quantised(tmp_path):
    hf = quantised_files.model("llama")
    folder, plain = quantised_files.write(tmp_path, hf, quantised_files.fp8(8, 32), FP8, matrices="lm_head.weight")
    configure(folder, quantization_config=FP8 | dict(weight_block_size=[8, 32]))
    assert_alike(given := flash_decode(folder, k=K), flash_decode(plain, k=K))
    assert given.source.stored == "FP8" and read_unembedding(folder).W_U.shape == (64, 72)
    assert layout(folder).unembedding.tensor == "lm_head.weight"


def test_a_zero_point_that_wraps_is_zero():
    """As AutoGPTQ unpacks it: the sum of the zero point and 1 keeps its bits alone."""
    words = torch.full((4, 8), -1, dtype=torch.int32)  # every number 15
    parts = {"qweight": words, "qzeros": torch.full((1, 1), -1, dtype=torch.int32), "scales": torch.ones(1, 8)}
    stored = gptq.GPTQ(GPTQ | dict(group_size=-1)).stored(parts)
    assert torch.equal(stored.unpack(slice(0, 32), slice(0, 8)), torch.full((32, 8), 15.0))


# Refusals


def refused(folder, message):
    for use in (flash_decode, load_model):
        with pytest.raises(ValueError, match=message):
            use(folder, **({} if use is flash_decode else dict(surface=families.loaded_surfaces()[0])))


@pytest.mark.parametrize(
    "quantisation, message",
    [
        (dict(quant_method="hqq"), r"quantised by 'hqq' .*expected one of fp8, .* bitsandbytes; take the unquantised"),
        (dict(bits=4), "quantised by None"),
        ([4], r"quantization_config is \[4\], expected an object"),
        (FP8 | dict(weight_block_size=[32]), r"weight_block_size is \[32\], expected rows and columns"),
        (GPTQ | dict(bits=5), r"bits are 5, expected one of \(2, 3, 4, 8\)"),
        (GPTQ | dict(checkpoint_format="marlin"), "checkpoint_format is 'marlin', expected one of gptq, gptq_v2"),
        (AWQ | dict(version="GEMV"), "version is 'gemv', expected 'gemm'"),
        (AWQ | dict(bits=3), "bits are 3, expected 4"),
        (dict(quant_method="compressed-tensors", format="pack-quantized"), "config_groups are None"),
        (
            dict(
                quant_method="compressed-tensors",
                format="pack-quantized",
                config_groups=dict(a=dict(weights=dict(num_bits=4, type="int", group_size="128"))),
            ),
            "no quantization_config of compressed-tensors .*fetch it again",
        ),
        (compressed("marlin-24", 4), "format is marlin-24, expected one of pack-quantized, "),
        (compressed("dense", 4) | dict(sparsity_config=dict(format="sparse-24-bitmask")), "format is dense"),
        (
            compressed("pack-quantized", 4) | dict(sparsity_config=dict(format="sparse-24-bitmask")),
            "rotated or sparse .sparse-24-bitmask.",
        ),
        (compressed("pack-quantized", 4) | dict(transform_config=dict(config_groups={})), "rotated or sparse"),
    ],
)
def test_unknown_quantisations_are_refused(written, tmp_path, quantisation, message):
    shutil.copytree(written("awq")[0], tmp_path / "x")
    configure(tmp_path / "x", quantization_config=quantisation)
    refused(tmp_path / "x", message)


UP = "model.layers.1.mlp.up_proj"
MISSING = {
    "fp8 blocks": {"weight_scale_inv": "is torch.float8_e4m3fn, whose scales are missing"},
    "mxfp4": {
        "gate_up_proj_scales": "its scales is missing",
        "gate_up_proj_blocks": "no tensor .*gate_up_proj|gate_up_proj_scales is torch.uint8",
    },
    "gptq int4": {name: f"its {name} is missing" for name in ("qzeros", "scales")},
    "gptq desc_act": {"qweight": "no tensor .*up_proj.weight|g_idx is torch.int32"},
    "awq": {name: f"its {name} is missing" for name in ("qzeros", "scales")},
    "packed int4": {f"weight_{name}": f"its {name} is missing" for name in ("scale", "shape")},
    "nvfp4": {"weight_scale": "its scale is missing", "weight_global_scale": "expected one float8 of 16 numbers"},
    "int8": {"weight_scale": "is torch.int8, whose scales are missing"},
    "nf4 of nested scales": {
        "weight.absmax": "its absmax is missing",
        "weight.quant_map": "its quant_map is missing",
        "weight.nested_absmax": "its nested_absmax is missing",
        "weight.quant_state.bitsandbytes__nf4": "its quant_state.bitsandbytes__.* is missing",
    },
    "bitsandbytes int8": {"SCB": "is torch.int8, whose scales are missing", "weight": "its weight is missing"},
}


def broken(folder, at, change):
    """A copy of a folder whose tensors of one layer's MLP that end so are changed."""
    shutil.copytree(folder, at)
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if ".1.mlp." in name and "down" not in name and name.endswith(change[0])]
    assert names
    quantised_files.change(at, {name: change[1](tensors[name]) for name in names})
    return at


@pytest.mark.parametrize("name, part", [(name, part) for name, parts in MISSING.items() for part in parts])
def test_a_missing_part_is_refused(written, tmp_path, name, part):
    end = part if name == "mxfp4" else f".{part}"
    refused(broken(written(name)[0], tmp_path / "x", (end, lambda tensor: None)), MISSING[name][part])


CHANGED = {
    "fp8 blocks": {"scale_inv": (lambda x: x[:, :-1], "expected one scale a block")},
    "fp8 per row": {"scale": (lambda x: x[:-1], "expected one scale a block")},
    "mxfp4": {"gate_up_proj_scales": (lambda x: x[:-1], "expected .expert, output, group, 16.")},
    "gptq int4": {
        ".scales": (lambda x: x[:, :-1], r"has scales of shape .*, expected \(4, 96\)"),
        ".qzeros": (lambda x: x[:-1], r"has qzeros of shape .*, expected \(4, 12\)"),
        ".g_idx": (lambda x: x + 1, "has g_idx .* up to 4; expected 64 of 4"),
        ".qweight": (lambda x: x.long(), "is torch.int64 .*; expected int32"),
    },
    "gptq int3": {".qweight": (lambda x: x[:-1], "which holds no whole number of 3 bits a word|has g_idx")},
    "awq": {
        ".scales": (lambda x: x[:, :-1], "has scales"),
        ".qweight": (lambda x: x[:-16], "expected one scale a block"),
    },
    "packed int4 with zeros": {
        "_scale": (lambda x: x[:-1], "is scaled by"),
        "_zero_point": (lambda x: x[:-1], "has zero points"),
        "_shape": (lambda x: x + 8, r"for a weight of \(104, 72\), expected int32 of 4 bits"),
    },
    "packed int4 in no order": {"_g_idx": (lambda x: x + 1, "up to 4, expected 4")},
    "nvfp4": {
        ".weight_scale": (lambda x: x[:, :-1], "expected one float8 of 16 numbers"),
        ".weight_global_scale": (
            lambda x: x.reshape(1).repeat(2),
            r"has weight_global_scale \(2,\), expected one number",
        ),
    },
    "nf4 of nested scales": {
        ".weight": (lambda x: x[:-1], "bytes with .* scales"),
        ".absmax": (lambda x: x[:-1], "nested_absmax for|bytes with"),
        "__nf4": (lambda x: x[:-1], "a quant_state that is no JSON"),
        ".quant_map": (lambda x: x[:-1], "nested_absmax for|from a table of 15"),
    },
    "bitsandbytes int8": {
        "SCB": (lambda x: x[:-1], "expected int8, one a row"),
        "weight_format": (lambda x: x + 1, "has weight_format 1, expected 0, rows as they are"),
    },
}


@pytest.mark.parametrize("name, part", [(name, part) for name, parts in CHANGED.items() for part in parts])
def test_parts_that_do_not_fit_are_refused(written, tmp_path, name, part):
    change, message = CHANGED[name][part]
    refused(broken(written(name)[0], tmp_path / "x", (part, change)), f"model.safetensors: .*({message})")


def test_nested_blocks_of_no_size_are_refused(written, tmp_path):
    def of_no_size(held):
        state = json.loads(bytes(held.tolist())) | dict(nested_blocksize=0)
        return torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)

    folder = broken(written("nf4 of nested scales")[0], tmp_path / "x", ("__nf4", of_no_size))
    refused(folder, "'nested_blocksize': 0.*, expected a shape and a blocksize")


def test_another_model_and_a_truncated_file_are_refused(written, tmp_path):
    folder = shutil.copytree(written("gptq int4")[0], tmp_path / "x")
    configure(folder, intermediate_size=128)
    with pytest.raises(ValueError, match=r"up_proj.weight is \(96, 64\), expected \(128, 64\) by config.json"):
        flash_decode(folder)
    configure(folder, intermediate_size=96, quantization_config=FP8)
    refused(folder, "no tensor model.layers.0.mlp.*weight|g_idx is .* quantised in another way")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    refused(folder, "truncated")


def test_rows_that_begin_within_a_byte_are_refused():
    parts, _ = quantised_files.four_bit_table(16)("x", torch.randn(4, 7))
    own = {name.removeprefix("x.") if name != "x" else "weight": tensor for name, tensor in parts.items()}
    with pytest.raises(ValueError, match="has rows of 7 numbers, expected an even number"):
        bitsandbytes.BitsAndBytes(BNB).stored(own)


def test_a_mixed_checkpoint_is_called_by_what_each_tensor_is():
    groups = dict(
        a=dict(weights=dict(num_bits=4, type="int", group_size=16)),
        b=dict(weights=dict(num_bits=8, type="float")),
        c=dict(weights=dict(num_bits=4, type="float", group_size=16)),
    )
    form = compressed_tensors.CompressedTensors(dict(format="mixed-precision", config_groups=groups))
    labels = [form.label(dict.fromkeys(parts)) for parts in (("packed", "shape"), ("weight",), ("packed",))]
    assert labels == [f"compressed-tensors {kind}" for kind in ("int4", "FP8", "MXFP4")]
