import copy
import dataclasses
import io
import json
import multiprocessing
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.test_neuron_map import Words
from tl_flash import NeuronMap, artefacts, compare, decode_directions
from tl_flash.maps import storage
from tl_flash.weights import digest


@pytest.fixture(scope="module")
def neurons():
    generator = torch.Generator().manual_seed(0)
    x, W_U = torch.randn(50, 8, generator=generator), torch.randn(8, 64, generator=generator)
    return decode_directions(x, W_U, k=3, tokens=[" w5"], tokenizer=Words())


@pytest.fixture
def path(neurons, tmp_path):
    neurons.save(tmp_path / "map.safetensors")
    return tmp_path / "map.safetensors"


def test_round_trip(neurons, path):
    loaded = NeuronMap.load(path)
    for name in ("norm", "mean", "std", "kurtosis"):
        assert torch.equal(getattr(loaded, name), getattr(neurons, name))
    for pole in ("positive", "negative"):
        for name in ("ids", "logits", "log_z", "write_z", "probs", "z"):
            assert torch.equal(getattr(getattr(loaded, pole), name), getattr(getattr(neurons, pole), name))
        assert (getattr(loaded, pole).strings == getattr(neurons, pole).strings).all()
    assert loaded.source == neurons.source and loaded.layers == neurons.layers
    assert torch.equal(loaded.null.z, neurons.null.z)
    assert str(loaded.find(" w5")) == str(neurons.find(" w5"))
    assert torch.equal(loaded.tracked[" w5"], neurons.tracked[" w5"])
    assert str(loaded["L0N3"]) == str(neurons["L0N3"])
    assert loaded.vocab.nameless() == neurons.vocab.nameless() == [60, 61, 62, 63]


def test_the_same_map_has_the_same_bytes(neurons, path, tmp_path):
    NeuronMap.load(path).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_map_has_the_permissions_of_any_new_file(path):
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_provenance_is_kept(path):
    source = NeuronMap.load(path).source
    assert source.dtype == "float32" and source.fold_ln is False and len(source.fingerprint) == 32
    assert source.versions["torch"].startswith(torch.__version__.split("+")[0])


def test_the_fingerprint_knows_every_weight(neurons):
    generator = torch.Generator().manual_seed(0)
    x, W_U = torch.randn(50, 8, generator=generator), torch.randn(8, 64, generator=generator)

    def fingerprint(x, W_U):
        return decode_directions(x, W_U, k=1).source.fingerprint

    assert fingerprint(x, W_U) == neurons.source.fingerprint
    assert fingerprint(x.T.contiguous().T, W_U.T.contiguous().T) == neurons.source.fingerprint, "layout is no value"
    nudged = x.clone()
    nudged[17, 3] = torch.nextafter(nudged[17, 3], torch.tensor(9.0))
    assert fingerprint(nudged, W_U) != neurons.source.fingerprint
    assert fingerprint(x.flip(0), W_U) != neurons.source.fingerprint
    assert fingerprint(x, W_U.flip(0)) != neurons.source.fingerprint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_digest_leaves_the_weights_as_they_are(dtype):
    weights = torch.randn(50, 8).to(dtype)
    before = weights.clone()
    digest(weights)
    assert torch.equal(weights, before)


def test_an_altered_file_is_refused(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["positive.logits"][0, 3, 1] += 1e-3
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="altered"):
        NeuronMap.load(path)


def test_an_altered_header_is_refused(path):
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[storage.FORMAT])
    header["side"] = "out"
    save_file(load_file(path), path, {storage.FORMAT: json.dumps(header)})
    with pytest.raises(ValueError, match="altered"):
        NeuronMap.load(path)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated"):
        NeuronMap.load(path)


def test_a_foreign_file_is_refused(path):
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no tl_flash.NeuronMap"):
        NeuronMap.load(path)
    path.write_text("not safetensors at all")
    with pytest.raises(ValueError, match="no safetensors file"):
        NeuronMap.load(path)


def test_a_newer_format_is_refused(path, neurons, monkeypatch):
    monkeypatch.setattr(storage, "_version", lambda map: 3)
    neurons.save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 3, newer.*upgrade"):
        NeuronMap.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        NeuronMap.load(tmp_path / "none.safetensors")


def test_a_crash_on_the_way_leaves_the_old_file(path, neurons, monkeypatch):
    before = path.read_bytes()

    def crash(*_):
        raise OSError("no space left on device")

    for place, name in ((artefacts, "save_file"), (os, "fsync"), (os, "replace")):
        monkeypatch.setattr(place, name, crash)
        with pytest.raises(OSError, match="no space"):
            neurons.save(path)
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name], "no partial file stays"


# Versions


@pytest.fixture(scope="module")
def pruned(neurons):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    x[[3, 9]] = 0
    W_U = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    return decode_directions(x, W_U, k=3, tokenizer=Words())


def version_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[storage.FORMAT])["version"]


def test_zero_directions_round_trip(pruned, tmp_path):
    path = tmp_path / "map.safetensors"
    pruned.save(path)
    loaded = NeuronMap.load(path)
    assert torch.equal(loaded.zero, pruned.zero) and loaded.zero.sum() == 2
    assert (loaded.positive.strings == pruned.positive.strings).all()
    assert torch.equal(loaded.positive.probs.isnan().any(-1), pruned.zero)
    loaded.save(tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_only_what_older_readers_would_misread_is_of_a_newer_format(neurons, pruned, tmp_path):
    no_norm = dataclasses.replace(neurons, source=dataclasses.replace(neurons.source, final_norm=False))
    for map, version in ((neurons, 1), (pruned, 2), (no_norm, 2)):
        map.save(tmp_path / "map")
        assert version_of(tmp_path / "map") == version


def test_a_map_of_before_final_norm_was_recorded_loads(neurons, tmp_path, monkeypatch):
    source = {key: value for key, value in dataclasses.asdict(neurons.source).items() if key != "final_norm"}
    monkeypatch.setattr(storage, "asdict", lambda _: source)
    neurons.save(tmp_path / "map")
    loaded = NeuronMap.load(tmp_path / "map")
    assert loaded.source.final_norm and torch.equal(loaded.positive.probs, neurons.positive.probs)


# Pickles


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def torch_saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_another_process(thing):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(copy.copy, (thing,))


@pytest.mark.parametrize("carry", [pickled, torch_saved, copy.deepcopy, in_another_process])
def test_results_travel(neurons, carry):
    hits = neurons.find(" w5")
    map, found, comparison = carry((neurons, hits, compare(neurons, neurons)))
    assert str(map.find(" w5")) == str(found) == str(hits) and map.vocab == neurons.vocab
    assert torch.equal(map.positive.probs, neurons.positive.probs)
    assert comparison.agreement == 1 and str(comparison.a["L0N3"]) == str(neurons["L0N3"])
    assert compare(map, neurons).agreement == 1
