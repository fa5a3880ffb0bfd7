"""Maps from GGUF files equal those of the models that they were written from; what is broken is refused."""

import struct

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from huggingface_hub.errors import EntryNotFoundError

from tests import families, gguf_files
from tests.gguf_files import D_MODEL, D_VOCAB
from tl_flash import compare, decode_to_file, flash_decode, load_model
from tl_flash.cli import main
from tl_flash.decode import job
from tl_flash.weights import layout, read, read_unembedding
from tl_flash.weights.formats import gguf as formats
from tl_flash.weights.formats.packed import Packed

K = 4
KINDS = [kind for kind in Kind if formats.is_known(kind) and int(kind) not in formats.PLAIN]


def written(folder, arch="llama", *, kind=Kind.F32, tied=True, name="tiny.gguf", **options):
    """A model, rounded as its file is, and the file."""
    hf = gguf_files.model(arch, tied)
    if kind is not Kind.F32:
        gguf_files.dequantised(hf, arch, kind)
    arrays, own = gguf_files.tensors(arch, hf), gguf_files.fields(arch, hf)
    return hf, gguf_files.write(folder / name, arch, arrays, own, kind, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return written(tmp_path_factory.mktemp("tiny"), kind=Kind.Q8_0, tokenizer=families.tokenizer())


@pytest.fixture
def broken(llama, tmp_path):
    """Writes the Llama's file with some of its bytes changed."""

    def broken(change):
        data = bytearray(llama[1].read_bytes())
        path = tmp_path / "broken.gguf"
        path.write_bytes(change(data) or data)
        return path

    return broken


def assert_alike(given, expected):
    assert torch.equal(given.positive.ids, expected.positive.ids)
    assert torch.equal(given.negative.ids, expected.negative.ids)
    for name in ("logits", "log_z", "write_z"):
        assert torch.allclose(getattr(given.positive, name), getattr(expected.positive, name), atol=1e-5), name
    assert (given.n_layers, given.n_experts, given.d_mlp) == (expected.n_layers, expected.n_experts, expected.d_mlp)


# The same as in memory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", gguf_files.CONFIGS)
def test_a_file_gives_the_map_of_its_model(tmp_path, arch, tied):
    if arch == "qwen2moe" and not families.STACKS_EXPERTS:
        pytest.skip("transformers 4 takes a default config for it, whose layers the file lacks")
    if arch.startswith("gemma2") and not tied:
        pytest.skip("llama.cpp has no name for it")
    hf, path = written(tmp_path, arch, tied=tied)
    for side in read(hf).sides:
        assert_alike(flash_decode(path, side=side, k=K), flash_decode(hf, side=side, k=K))
    assert torch.allclose(read(path).directions(1, "out"), read(hf).directions(1, "out"), atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_quantised_matrices_are_what_the_package_makes_of_them(tmp_path, kind):
    hf, path = written(tmp_path, kind=kind)
    for side in ("in", "gate", "out"):
        assert torch.equal(read(path).directions(1, side), read(hf).directions(1, side))
    given = flash_decode(path, k=K)
    assert_alike(given, flash_decode(hf, k=K))
    assert given.source.stored == f"GGUF {kind.name}"


def test_experts_are_read_one_after_the_other(tmp_path):
    hf, path = written(tmp_path, "qwen3moe", kind=Kind.Q4_0)
    for side in ("in", "gate", "out"):
        whole = read(path).directions(1, side)
        assert torch.equal(whole, read(hf).directions(1, side))
        assert torch.equal(read(path).directions(1, side, neurons=slice(20, 70)), whole[20:70])


def test_small_blocks_change_no_row(llama, monkeypatch):
    hf, path = llama
    whole = flash_decode(path, k=K, side="out")
    monkeypatch.setattr(job, "BLOCK", 20)
    assert_alike(flash_decode(path, k=K, side="out"), whole)


def test_its_own_tokenizer_names_the_tokens(llama):
    hf, path = llama
    assert read(path).vocab.strings == read(hf, tokenizer=families.tokenizer()).vocab.strings
    assert read_unembedding(path).W_U.shape == (D_MODEL, D_VOCAB)
    assert layout(path).layers[1].neurons[0].up.tensor == "ffn_up.weight"


def test_a_map_says_how_its_model_was_stored(llama, tmp_path):
    hf, path = llama
    given = flash_decode(path, k=K, tokenizer=families.tokenizer())
    given.save(tmp_path / "map.safetensors")
    assert type(given).load(tmp_path / "map.safetensors").source.stored == "GGUF Q8_0"
    plain = flash_decode(hf, k=K, tokenizer=families.tokenizer())
    assert "across quantisations (GGUF Q8_0 against float32)" in repr(compare(given, plain))
    assert "across" not in repr(compare(given, given)) and "across" not in repr(compare(plain, plain))


def test_the_command_line_and_a_decode_to_a_file(llama, tmp_path, capsys):
    _, path = llama
    assert main(["decode", str(path), "-o", str(tmp_path / "a.safetensors"), "-k", "3"]) == 0
    decode_to_file(path, tmp_path / "b.safetensors", k=3)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert main(["find", str(path), "dog", "-n", "2"]) == 0 and "'dog'" in capsys.readouterr().out


@pytest.mark.parametrize("surface", families.loaded_surfaces())
def test_a_file_is_loaded_to_clamp(tmp_path, surface):
    hf, path = written(tmp_path, "qwen2", kind=Kind.Q8_0, tied=False, tokenizer=families.tokenizer())
    model = load_model(path, surface=surface)
    ids = torch.randint(D_VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given, expected = (out - out.mean(-1, keepdim=True) for out in (model(ids), hf(ids).logits))
    assert torch.allclose(given, expected, atol=1e-3 * float(expected.abs().max()))


# Slices


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_those_of_the_whole(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stack, rows, columns = 2, 3, 4 * block
    data = np.random.default_rng(0).integers(0, 256, (stack, rows, 4 * size), dtype=np.uint8)
    path = tmp_path / "blocks"
    path.write_bytes(b"before" + data.tobytes())
    info = formats.Info(path, (stack, rows, columns), int(kind), 6)
    packed = formats.GGUFTensors({"x": info}, "x")["x"]
    with np.errstate(all="ignore"):
        whole = torch.from_numpy(gguf.quants.dequantize(data, kind))
    assert isinstance(packed, Packed) and packed.shape == whole.shape
    middle = slice(block // 2, 2 * block + 3)
    views = [
        lambda x: x,
        lambda x: x[1:],
        lambda x: x.unbind()[1][1:3],
        lambda x: x.mT[:, middle],
        lambda x: x.unbind()[0].T[middle],
        lambda x: x[..., 1::2, :],
        lambda x: x.mT[..., 1::2, :].unbind()[1][2:9],
        lambda x: x.mT.chunk(2, dim=-2)[1],
        lambda x: x.unbind()[0].split(2)[1],
        lambda x: x[1][0:0],
        lambda x: x.detach().clone(),
    ]
    for view in views:
        given, expected = view(packed) * 1, view(whole) * 1
        assert given.shape == expected.shape and torch.equal(given.nan_to_num(7), expected.nan_to_num(7))


# Which file


def test_a_folder_with_one_file(llama, tmp_path):
    _, path = llama
    assert_alike(flash_decode(path.parent, k=K), flash_decode(path, k=K))


def test_a_folder_may_be_called_as_a_file(llama, tmp_path):
    _, path = llama
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "folder.gguf" / "x.gguf").write_bytes(path.read_bytes())
    assert_alike(flash_decode(tmp_path / "folder.gguf", k=K), flash_decode(path, k=K))


def test_of_several_files_one_is_named(tmp_path):
    written(tmp_path, name="a.gguf")
    written(tmp_path, name="b.gguf", kind=Kind.Q8_0)
    with pytest.raises(ValueError, match=rf"2 models in GGUF.*give one of {tmp_path}/a.gguf, {tmp_path}/b.gguf"):
        flash_decode(tmp_path)
    assert flash_decode(tmp_path / "b.gguf", k=1).source.stored == "GGUF Q8_0"


def test_safetensors_come_before_a_file_beside_them(llama, tmp_path):
    hf, path = llama
    (tmp_path / "x.gguf").write_bytes(path.read_bytes())
    hf.save_pretrained(tmp_path)
    assert flash_decode(tmp_path, k=1).source.stored is None


@pytest.fixture
def split(tmp_path):
    hf = gguf_files.model("llama")
    arrays, own = gguf_files.tensors("llama", hf), gguf_files.fields("llama", hf)
    names, paths = sorted(arrays), []
    for part in range(3):
        some = {name: arrays[name] for name in names[part::3]}
        path = tmp_path / f"x-{part + 1:05}-of-00003.gguf"
        paths.append(gguf_files.write(path, "llama", some, own if part == 0 else {}, split=(part, 3)))
    return hf, paths


def test_a_split_file_is_read_by_any_of_its_parts(split):
    hf, paths = split
    expected = flash_decode(hf, k=K)
    for source in (paths[0], paths[2], paths[0].parent):
        assert_alike(flash_decode(source, k=K), expected)
    with pytest.raises(ValueError, match="one of 3 parts.*llama-gguf-split --merge"):
        load_model(paths[0])


def test_a_missing_or_misplaced_part_is_refused(split):
    _, paths = split
    held = paths[1].read_bytes()
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ValueError, match="x-00002-of-00003.gguf: no part 2 of 3 of x-00001-of-00003.gguf"):
        flash_decode(paths[0])
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="x-00002-of-00003.gguf: no such file, in which .* goes on"):
        flash_decode(paths[0])
    paths[0].rename(alone := paths[0].with_name("alone.gguf"))
    with pytest.raises(ValueError, match="the first of 3 parts; expected all"):
        flash_decode(alone)
    assert held


def test_files_on_the_hub(llama, monkeypatch):
    _, path = llama
    names = ["README.md", "q8.gguf", "mmproj-q8.gguf"]

    def fetch(repo, name, **_):
        if name != "q8.gguf":
            raise EntryNotFoundError(f"no {name}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: names)
    expected = flash_decode(path, k=K)
    for source in ("tiny/model", "tiny/model/q8.gguf"):
        assert_alike(flash_decode(source, k=K), expected)
    names.append("q4.gguf")
    with pytest.raises(ValueError, match="give one of tiny/model/q4.gguf, tiny/model/q8.gguf"):
        flash_decode("tiny/model")
    with pytest.raises(FileNotFoundError, match="tiny/model/none.gguf: the hub has no such file"):
        flash_decode("tiny/model/none.gguf")


# Refusals


def refused(path, message, error=ValueError):
    for use in (flash_decode, load_model):
        with pytest.raises(error, match=message):
            use(path)


def test_files_that_are_none(tmp_path):
    refused(tmp_path / "none.gguf", "no such file", FileNotFoundError)
    for data in (b"", b"GG", b"safetensors, say", b"\x00" * 64):
        (tmp_path / "x.gguf").write_bytes(data)
        refused(tmp_path / "x.gguf", "no GGUF file")


def test_truncated_files_are_refused(broken):
    size = len(broken(lambda data: None).read_bytes())
    refused(broken(lambda data: data[:-1]), f"truncated: .* ends at byte .*, the file at {size - 1}; fetch it again")
    for keep in (4, 10, 24, 40, 200, 3000):
        refused(broken(lambda data, keep=keep: data[:keep]), "header is truncated or altered")


def test_other_versions_and_byte_orders_are_refused(broken):
    for version, message in ((1, "GGUF version 1"), (4, "GGUF version 4"), (3 << 24, "of a big-endian machine")):

        def change(data, version=version):
            data[4:8] = struct.pack("<I", version)

        refused(broken(change), f"{message}; expected little-endian GGUF of version")


def test_altered_headers_are_refused(broken):
    def at(data, name):
        return data.index(name.encode()) + len(name)

    def change(name, skip, format, value):
        def change(data):
            place = at(data, name) + skip
            data[place : place + struct.calcsize(format)] = struct.pack(format, value)

        return change

    name = "blk.1.ffn_up.weight"  # then the number of axes (4 bytes), two lengths (8 each), the type (4), the place (8)
    refused(broken(change(name, 4, "<Q", 65)), "altered: blk.1.ffn_up.weight, .* fetch the file again")
    refused(broken(change(name, 24, "<Q", 32)), "altered: .* begins at byte .* where .* ends at")
    refused(broken(change(name, 24, "<Q", 2**40)), "truncated: blk.1.ffn_up.weight ends at byte")
    path = broken(change(name, 20, "<I", 99))
    with pytest.raises(
        ValueError, match=r"blk.1.ffn_up.weight is of type 99, which gguf .* does not dequantise; update"
    ):
        flash_decode(path)
    refused(broken(lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:]), "header is truncated or altered")


def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(tmp_path):
    hf = gguf_files.model("llama")
    arrays, own = gguf_files.tensors("llama", hf), gguf_files.fields("llama", hf)
    for name in ("blk.1.ffn_down.weight", "blk.1.ffn_norm.weight", "output_norm.weight", "token_embd.weight"):
        some = {other: array for other, array in arrays.items() if other != name}
        with pytest.raises(ValueError, match=f"no tensor {name}; expected a whole language model"):
            flash_decode(gguf_files.write(tmp_path / "x.gguf", "llama", some, own))
        if name != "token_embd.weight":
            other = gguf_files.write(tmp_path / "y.gguf", "llama", arrays | {name: arrays[name][:-1]}, own)
            with pytest.raises(ValueError, match=rf"{name} is \(.*\), expected \(.*\) by its header"):
                flash_decode(other)


def test_an_architecture_that_transformers_does_not_read_takes_a_config_beside_it(tmp_path):
    hf = gguf_files.model("llama")
    path = gguf_files.write(tmp_path / "x.gguf", "olmo2", gguf_files.tensors("llama", hf), {})
    with pytest.raises(ValueError, match="architecture 'olmo2', whose config .*; put the model's config.json beside"):
        flash_decode(path)
    with pytest.raises(ValueError, match="transformers does not load it .*; load the unquantised model"):
        load_model(path)
