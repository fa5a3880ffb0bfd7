"""What the packages that define formats pack is read to the numbers that they unpack, bit by bit.

They are large or need other versions than this package, which runs without them; where they are missing, the tests of
`test_quantised.py` on values packed by hand remain.
"""

import pytest
import torch
import transformers

from tests import quantised_files
from tl_flash.weights import read
from tl_flash.weights.formats.bitsandbytes import BitsAndBytes
from tl_flash.weights.formats.compressed_tensors import CompressedTensors

ROWS, COLUMNS = 40, 192  # of bitsandbytes' blocks of 64 each within a row: its kernel for CPUs misreads others (0.50.2)


def whole(stored):
    rows, columns = stored.shape
    return stored.unpack(slice(0, rows), slice(0, columns))


def weight(dtype):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)


GROUPS = dict(strategy="group", group_size=16)
CASES = {
    "int4": ("pack-quantized", dict(num_bits=4, **GROUPS)),
    "int4 with zeros": ("pack-quantized", dict(num_bits=4, symmetric=False, **GROUPS)),
    "int4 a row": ("pack-quantized", dict(num_bits=4, symmetric=False, strategy="channel")),
    "int8 packed": ("pack-quantized", dict(num_bits=8, **GROUPS)),
    "int2": ("pack-quantized", dict(num_bits=2, **GROUPS)),
    "int8": ("int-quantized", dict(num_bits=8, strategy="channel")),
    "int8 with zeros": ("int-quantized", dict(num_bits=8, strategy="channel", symmetric=False)),
    "fp8 in all": ("float-quantized", dict(num_bits=8, type="float", strategy="tensor")),
    "fp8 a row": ("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
    "fp8 blocks": ("naive-quantized", dict(num_bits=8, type="float", strategy="block", block_structure=[16, 32])),
    "nvfp4": ("nvfp4-pack-quantized", dict(num_bits=4, type="float", strategy="tensor_group", group_size=16)),
    "mxfp4": ("mxfp4-pack-quantized", dict(num_bits=4, type="float", strategy="group", group_size=32)),
    "mxfp8": ("mxfp8-quantized", dict(num_bits=8, type="float", strategy="group", group_size=32)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_compressed_tensors(name, dtype):
    pytest.importorskip("compressed_tensors", reason="needs Python 3.11 and torch 2.10")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    form, about = CASES[name][0], dict(CASES[name][1])
    if about["num_bits"] == 4 and about.get("type") == "float":
        about = about | dict(scale_dtype=torch.uint8 if form.startswith("mx") else torch.float8_e4m3fn)
    if form == "mxfp8-quantized":
        about = about | dict(scale_dtype=torch.uint8)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**about))
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight(dtype), **_parameters(weight(dtype), scheme.weights)}
    packed = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(packed), scheme)["weight"]
    config = quantised_files.compressed(form, about.pop("num_bits"), **about)
    parts = {name if name == "weight" else name.removeprefix("weight_"): tensor for name, tensor in packed.items()}
    given = whole(CompressedTensors(config).stored(parts))
    assert given.dtype is torch.float32 and torch.equal(given.to(expected.dtype), expected)
    assert (expected.float() - weight(torch.float32)).norm() < 0.7 * weight(torch.float32).norm()


def _parameters(tensor, args):
    """Scales and zero points, as an observer of the smallest and the largest number sets them."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    views = {"tensor": tensor.reshape(1, -1), "channel": tensor}
    if args.strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(tensor, (0, -COLUMNS % wide, 0, -ROWS % high))
        view = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2)
    else:
        view = views.get(args.strategy, tensor.unflatten(-1, (-1, args.group_size or 1)))
    keep = args.strategy == "channel"
    low, high = view.amin(-1, keepdim=keep), view.amax(-1, keepdim=keep)
    found = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(low.amin().reshape(1), high.amax().reshape(1))
    scale, zero = calculate_qparams(low, high, args, global_scale=found.get("weight_global_scale"))
    return found | {"weight_scale": scale, "weight_zero_point": zero}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_in_four_bits(kind, nested, dtype):
    functional = pytest.importorskip("bitsandbytes.functional", reason="a large package")
    packed, state = functional.quantize_4bit(weight(dtype), compress_statistics=nested, quant_type=kind)
    expected = functional.dequantize_4bit(packed, state)
    given = whole(BitsAndBytes({}).stored({"weight": packed, **state.as_dict(packed=True)}))
    assert given.dtype is torch.float32 and torch.equal(given.to(dtype), expected)


def test_bitsandbytes_in_eight_bits():
    functional = pytest.importorskip("bitsandbytes.functional", reason="a large package")
    held, scale, _ = functional.int8_vectorwise_quant(weight(torch.float16))
    given = whole(BitsAndBytes({}).stored({"weight": held, "SCB": scale}))
    assert torch.equal(given, functional.int8_vectorwise_dequant(held, scale))


@pytest.mark.parametrize(
    "options",
    [
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        dict(load_in_8bit=True),
    ],
)
def test_a_folder_that_transformers_saved(tmp_path, options):
    pytest.importorskip("bitsandbytes", reason="a large package")
    quantised_files.model("llama").save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(**options)
    load = transformers.AutoModelForCausalLM.from_pretrained
    hf = load(tmp_path / "plain", quantization_config=config, dtype=torch.float32, device_map="cpu")
    hf.save_pretrained(tmp_path / "packed")
    hf = hf.dequantize(torch.float32)
    for side in ("in", "gate"):  # rows of 64; the others are not
        given, expected = (read(model).directions(1, side) for model in (tmp_path / "packed", hf.float()))
        assert torch.equal(given, expected), side
