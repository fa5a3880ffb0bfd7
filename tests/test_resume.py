"""A decode into a file may end at any moment and goes on from there, to the same bytes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests import families
from tl_flash import NeuronMap, artefacts, flash_decode
from tl_flash.cli import main
from tl_flash.decode import decode_to_file, feed, parts
from tl_flash.decode.parts import Parts
from tl_flash.weights.formats.safetensors import INDEX

N_LAYERS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Llama of many layers, in one folder."""
    config = LlamaConfig(**families._GROUPED | dict(num_hidden_layers=N_LAYERS))
    model, folder = LlamaForCausalLM(config), tmp_path_factory.mktemp("llama")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(mean=float(parameter.ndim == 1), std=0.3, generator=generator)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "llama")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "map.safetensors"


@pytest.fixture
def undisturbed(folder, tmp_path):
    """The bytes of the map that one process makes without interruption."""
    decode_to_file(folder, tmp_path / "undisturbed.safetensors", k=3)
    return (tmp_path / "undisturbed.safetensors").read_bytes()


def stop_at(monkeypatch, count, stop):
    """Let `stop` happen in place of keeping part number `count`, and count the parts that are decoded."""
    keep, decoded = Parts.keep, []

    def kept(self, part):
        decoded.append(part.unit)
        if len(decoded) == count:
            stop()
        keep(self, part)

    monkeypatch.setattr(Parts, "keep", kept)
    return decoded


def crash():
    raise RuntimeError("power cut")


def interrupted(monkeypatch, folder, out, count=5, **options):
    """Decode until part number `count`."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_at(patch, count, crash)
        decode_to_file(folder, out, **{"k": 3} | options)


def spoil(folder, value):
    """Change one weight of layer 6, and say in which file."""
    name = "model.layers.6.mlp.up_proj.weight"
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][0, 0] = value
    save_file(tensors, shard)
    return shard


def test_undisturbed_it_is_the_map_of_flash_decode(folder, out):
    given, expected = decode_to_file(folder, out, k=3), flash_decode(folder, k=3)
    assert sorted(os.listdir(out.parent)) == ["llama", out.name]
    expected.save(out.with_name("other"))
    assert out.read_bytes() == out.with_name("other").read_bytes()
    assert str(NeuronMap.load(out)["L3N7"]) == str(given["L3N7"])


def test_it_goes_on_where_it_was(monkeypatch, folder, out, undisturbed):
    interrupted(monkeypatch, folder, out)
    assert not out.exists() and len(list(out.with_name(f"{out.name}.parts").glob("layer*"))) == 4
    decoded = stop_at(monkeypatch, -1, crash)
    decode_to_file(folder, out, k=3)
    assert [unit.layer for unit in decoded] == list(range(4, N_LAYERS)), "no finished layer is decoded again"
    assert out.read_bytes() == undisturbed
    assert not out.with_name(f"{out.name}.parts").exists()


def test_a_model_in_memory_goes_on_too(monkeypatch, bridge, tmp_path, out):
    interrupted(monkeypatch, bridge, out, count=2)
    decode_to_file(bridge, out, k=3)
    flash_decode(bridge, k=3).save(tmp_path / "whole")
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_map_before_stays_until_the_new_one_is_whole(monkeypatch, folder, out):
    out.write_text("the map before")
    interrupted(monkeypatch, folder, out)
    assert out.read_text() == "the map before"


@pytest.mark.parametrize("harm", ["cut", "alter", "swap"])
def test_a_broken_part_is_done_again(monkeypatch, folder, out, undisturbed, harm):
    interrupted(monkeypatch, folder, out)
    parts = out.with_name(f"{out.name}.parts")
    first, second = parts / "layer0-neuron0.safetensors", parts / "layer1-neuron0.safetensors"
    if harm == "cut":
        first.write_bytes(first.read_bytes()[:-1])
    elif harm == "alter":
        first.write_bytes(first.read_bytes()[:-1] + b"\x00")
    else:
        plan = parts / "plan.json"
        kept = plan.read_text()
        shutil.rmtree(parts)
        interrupted(monkeypatch, folder, out, count=3, side="out")
        foreign = second.read_bytes()
        shutil.rmtree(parts)
        interrupted(monkeypatch, folder, out)
        assert plan.read_text() == kept
        second.write_bytes(foreign)
    decode_to_file(folder, out, k=3)
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize(
    "options, what",
    [
        ({"k": 4}, "k was 3, is 4"),
        ({"side": "out"}, "side was in, is out"),
        ({"fold_ln": False}, "fold_ln was True, is False"),
        ({"layers": [0, 1]}, r"layers was \[0, 1, .*, is \[0, 1\]"),
        ({"tokens": [5]}, r"tokens was \[\], is \[5\]"),
        ({"ignore_tokens": [5]}, "ignored was"),
        ({"precision": "fast"}, "precision was exact, is fast"),
        ({"score": "cosine"}, "score was dot, is cosine"),
    ],
)
def test_other_options_are_refused(monkeypatch, folder, out, options, what):
    interrupted(monkeypatch, folder, out)
    with pytest.raises(ValueError, match=f"parts of another decode .*{what}.*delete the folder"):
        decode_to_file(folder, out, **{"k": 3} | options)


def test_another_tokenizer_is_refused(monkeypatch, folder, out, tokenizer):
    interrupted(monkeypatch, folder, out)
    with pytest.raises(ValueError, match="vocabulary was"):
        decode_to_file(folder, out, k=3, tokenizer=tokenizer)


def test_a_changed_checkpoint_is_refused(monkeypatch, folder, out):
    interrupted(monkeypatch, folder, out)
    shard = next(
        path for path in folder.glob("*.safetensors") if "model.layers.6.mlp.up_proj.weight" in load_file(path)
    )
    tensors = load_file(shard)
    tensors["model.layers.6.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=f"weights was .*{shard.name}"):
        decode_to_file(folder, out, k=3)


def test_a_changed_model_in_memory_is_refused(monkeypatch, out):
    model = LlamaForCausalLM(LlamaConfig(**families._GROUPED))
    interrupted(monkeypatch, model, out, count=2)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] += 1
    with pytest.raises(ValueError, match="weights was"):
        decode_to_file(model, out, k=3)


def test_a_refused_decode_is_in_nobodys_way(folder, out):
    with pytest.raises(ValueError, match="k: expected"):
        decode_to_file(folder, out, k=98)
    assert decode_to_file(folder, out, k=3).k == 3


def test_weights_that_cannot_be_read_leave_what_was_before(folder, out):
    shard = next(
        path for path in folder.glob("*.safetensors") if "model.layers.6.mlp.up_proj.weight" in load_file(path)
    )
    tensors = load_file(shard)
    tensors["model.layers.6.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, shard)
    with pytest.raises(ValueError, match="layer 6: W_in holds 1 NaN"):
        decode_to_file(folder, out, k=3)
    assert len(list(out.with_name(f"{out.name}.parts").glob("layer*"))) == 6


def test_a_full_disk_keeps_what_is_finished(monkeypatch, capsys, folder, out, undisturbed):
    save, saved = artefacts.save_file, []

    def full(*args):
        saved.append(args)
        if len(saved) > 4:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(*args)

    monkeypatch.setattr(artefacts, "save_file", full)
    assert main(["decode", str(folder), "-o", str(out), "-k", "3"]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "4 parts that were finished are kept in" in error
    assert error.count("\n") == 1 and not list(out.parent.rglob("*.partial"))
    monkeypatch.undo()
    assert main(["decode", str(folder), "-o", str(out), "-k", "3"]) == 0
    assert out.read_bytes() == undisturbed


def test_no_space_for_the_plan_is_told(monkeypatch, capsys, folder, out):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parts.os, "fsync", full)
    assert main(["decode", str(folder), "-o", str(out)]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(monkeypatch, capsys, folder, out, undisturbed):
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(["decode", str(folder), "-o", str(out), "-k", "3"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert f"4 of {N_LAYERS} parts are done and kept in {out}.parts; the same command goes on" in captured.err
    assert main(["decode", str(folder), "-o", str(out), "-k", "3"]) == 0
    assert out.read_bytes() == undisturbed


KILLED = """
import os, random, signal, sys, time
from tl_flash import decode_to_file
folder, out, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
random.seed(0)
for attempt in range(kills + 1):
    child = os.fork()
    if child == 0:
        decode_to_file(folder, out, k=3, progress=False)
        os._exit(0)
    if attempt < kills:
        while not os.path.isdir(out + ".parts"):
            time.sleep(1e-3)
        time.sleep(random.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status))
    if os.path.exists(out):
        os.rename(out, f"{out}.{attempt}")
"""


def test_killed_at_random_moments_it_loses_nothing(folder, out, undisturbed):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), str(out), "6"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    signals = run.stdout.split()
    assert signals.count("9") >= 3 and signals[-1] == "0", "else this test shows nothing"
    maps = [path for path in out.parent.glob(f"{out.name}.*") if path.is_file()]
    assert maps and all(path.read_bytes() == undisturbed for path in maps)


def test_the_plan_can_be_read(monkeypatch, folder, out):
    interrupted(monkeypatch, folder, out)
    plan = json.loads((out.with_name(f"{out.name}.parts") / "plan.json").read_text())
    assert plan["model"] == str(folder) and plan["k"] == 3 and plan["side"] == "in"


@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="threads share their number")
def test_reading_ahead_takes_few_threads_and_leaves_the_others_theirs():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        seen = list(feed.made_ahead(torch.get_num_threads() for _ in range(3)))
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1]
