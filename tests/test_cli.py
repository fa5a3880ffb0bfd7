import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.test_neuron_map import Words
from tl_flash import JacobianLens, NeuronMap, decode_directions, demo, explain, load_model
from tl_flash.cli import main


@pytest.fixture(scope="module")
def map_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "map.safetensors"
    generator = torch.Generator().manual_seed(0)
    W_U = torch.randn(16, 60, generator=generator)
    x = torch.cat([torch.randn(300, 16, generator=generator), W_U.T])
    decode_directions(x, W_U, k=3, tokenizer=Words()).save(path)
    return str(path)


def run(capsys, *argv):
    status = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_find(capsys, map_path):
    status, out, _ = run(capsys, "find", map_path, " w9", "-n", 3)
    assert status == 0 and "' w9'" in out and "L0N309" in out
    status, out, _ = run(capsys, "find", map_path, " w9", "-n", 3, "--by", "coherence", "--json")
    records = json.loads(out)
    hits = NeuronMap.load(map_path).find(" w9", n=3, by="coherence")
    assert [record["neuron"] for record in records] == [str(hit.neuron) for hit in hits]
    assert [record["z"] for record in records] == [hit.z for hit in hits]


def test_find_in_a_model(capsys, map_path):
    from tl_flash import demo, find_neurons

    folder = str(demo.path("base"))
    status, out, _ = run(capsys, "find", folder, "dog", "-n", 3, "--side", "out")
    assert status == 0 and "tokens: " in out and "by z" in out
    status, out, _ = run(capsys, "find", folder, "dog", "-n", 3, "--related", 2, "--by", "coherence", "--json")
    expected = find_neurons(folder, "dog", n=3, related=2, by="coherence")
    records = json.loads(out)
    assert status == 0 and [record["neuron"] for record in records] == [str(hit.neuron) for hit in expected]
    assert [record["q_value"] for record in records] == pytest.approx([hit.q_value for hit in expected])
    for argv, message in (
        ([folder, "xyzzy!"], "concept 'xyzzy!'"),
        ([folder, "dog", "--pole", "negative"], "--pole"),
        ([folder, "dog", "--by", "write"], "by: expected one of 'z', 'p', 'coherence'"),
        ([folder, " "], "concept: expected a word"),
        ([map_path, " w9", "--related", 2], "--related"),
        ([map_path, " w9", "--side", "in"], "--side"),
    ):
        status, out, err = run(capsys, "find", *argv)
        assert status == 1 and out == "" and err.count("\n") == 1 and message in err, err


def test_show(capsys, map_path):
    status, out, _ = run(capsys, "show", map_path)
    assert status == 0 and "NeuronMap of" in out and "the most specialised neurons" in out
    status, out, _ = run(capsys, "show", map_path, "L0N309", "L0N1")
    assert status == 0 and "L0N309" in out and "negative pole" in out and "L0N1," in out
    status, out, _ = run(capsys, "show", map_path, "L0N309", "--json")
    assert len(json.loads(out)) == 6 and json.loads(out)[0]["token"] == " w9"
    status, out, _ = run(capsys, "show", map_path, "-n", 4, "--json")
    assert len(json.loads(out)) == 4


def test_layout(capsys, tmp_path):
    import transformers

    config = transformers.Qwen3MoeConfig(num_hidden_layers=3, mlp_only_layers=[0])
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    status, out, _ = run(capsys, "layout", tmp_path)
    assert status == 0 and "layer 0\n  dense: up mlp.up_proj.weight" in out
    assert "layers 1-2\n  routed: up mlp.experts.{}.up_proj.weight; gate mlp.experts.{}.gate_proj.weight" in out
    assert "reads: RMSNorm (post_attention_layernorm.weight)" in out and "unembedding: lm_head.weight" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "MAP", "L5N0"], "holds layers [0]"),
        (["show", "MAP", "dog"], "L3N17"),
        (["find", "MAP", "w9"], "did you mean ' w9'"),
        (["find", "MAP", " w9", "--by", "size"], "by: expected"),
        (["find", "nowhere.safetensors", " w9"], "no such file"),
        (["decode", "/no/such/folder"], "no such folder"),
        (["decode", "gpt2", "-o", "/no/such/folder/map"], "no such folder to write"),
        (["decode", "gpt2", "--surface", "jax"], "surface: expected"),
        (["decode", "gpt2", "-o", "tests"], "tests: a folder"),
        (["lens", "gpt2", "-o", "/no/such/folder/lens"], "no such folder to write the lens to"),
        (["clamp", "gpt2", "L0N1=1", "L0N1=2", "--prompt", "the"], "neurons: expected each once"),
        (["report", "MAP", "--compare", "MAP", "--compare", "MAP"], "compare: expected each side once"),
        (["report", "MAP", "-o", "tests"], "tests: a folder"),
        (["report", "MAP", "--validation", "README.md"], "README.md: expected what `--json` prints"),
        (["report", "MAP", "--validation", "MAP"], "expected a text file in UTF-8"),
    ],
)
def test_refusals_are_one_line(capsys, map_path, argv, message):
    status, out, err = run(capsys, *(map_path if part == "MAP" else part for part in argv))
    assert status == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_wrong_usage_has_its_own_status(capsys):
    assert run(capsys, "nonsense")[0] == 2
    assert run(capsys, "find")[0] == 2
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(command in out for command in ("decode", "find", "show"))


def test_compare(capsys, map_path):
    status, out, _ = run(capsys, "compare", map_path, map_path)
    assert status == 0 and "100.0% of 360 neurons keep their top token" in out and "surest" in out
    status, out, _ = run(capsys, "compare", map_path, map_path, "--json")
    parsed = json.loads(out)
    assert parsed["agreement"] == 1 and parsed["changed"] == [] and len(parsed["by_layer"]) == 1


def test_a_lens_from_a_trained_model(capsys, tmp_path, stories_path):
    (tmp_path / "prompts.txt").write_text("One day,\n\nThere was a little dog\n")
    lens, path = tmp_path / "lens.safetensors", tmp_path / "map.safetensors"
    status, out, _ = run(capsys, "lens", stories_path, tmp_path / "prompts.txt", "-o", lens)
    assert status == 0 and "from 2 prompts" in out
    status, out, _ = run(capsys, "decode", stories_path, "--side", "out", "--lens", lens, "-o", path)
    assert status == 0 and "through a lens" in out and NeuronMap.load(path).source.lens


def test_a_lens_made_on_the_way(capsys, tmp_path, stories_path):
    lens, path = tmp_path / "lens.safetensors", tmp_path / "map.safetensors"
    status, out, _ = run(capsys, "lens", stories_path, "-o", lens)
    assert status == 0 and "mean_field" in out and "from 16 prompts" in out
    status, out, _ = run(capsys, "decode", stories_path, "--side", "out", "--lens", "auto", "-o", path)
    assert status == 0 and "through a lens (mean_field, 16 texts)" in out
    assert NeuronMap.load(path).source.lens == JacobianLens.load(lens).fingerprint
    for given in (lens, "auto"):
        status, out, _ = run(capsys, "validate", stories_path, path, "-n", 2, "--controls", 2, "--lens", given)
        assert status == 0 and "2 neurons" in out
        status, out, _ = run(capsys, "find", stories_path, "dog", "--side", "lens", "--lens", given, "-n", 2)
        assert status == 0 and "lens" in out
    status, _, err = run(capsys, "validate", stories_path, path, "-n", 2, "--controls", 2)
    assert status == 1 and "the lens that the map was made with" in err
    status, _, err = run(capsys, "lens", stories_path, "--method", "best", "-o", lens)
    assert status == 1 and 'expected "mean_field", "exact" or "mixed"' in err


def test_clamp_a_trained_model(capsys, stories_path):
    argv = ["clamp", stories_path, "L4N3=40", "--prompt", "One day", "--new-tokens", 5]
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "before:" in out and "after:" in out
    status, out, _ = run(capsys, *argv, "--json")
    [record] = json.loads(out)
    assert record["prompt"] == "One day" and record["before"] != record["after"]
    status, _, err = run(capsys, "clamp", stories_path, "L4N3", "--prompt", "One day")
    assert status == 1 and "L3N17=8.0" in err
    status, _, err = run(capsys, "clamp", stories_path, "L9N3=1", "--prompt", "One day")
    assert status == 1 and "layer 9" in err


def test_validate_a_trained_model(capsys, tmp_path, stories_path):
    path = tmp_path / "map.safetensors"
    assert run(capsys, "decode", stories_path, "--side", "out", "-o", path)[0] == 0
    status, out, _ = run(capsys, "validate", stories_path, path, "-n", 2, "--controls", 3, "--json")
    records = json.loads(out)
    assert status == 0 and len(records) == 2 and {"dlogp", "q_value"} <= set(records[0])
    status, out, _ = run(capsys, "validate", stories_path, path, "-n", 2, "--controls", 3)
    assert "labels raised" in out


def test_explain_a_prompt_of_the_embedded_model(capsys):
    folder, prompt = str(demo.path("base")), "My favourite animal is the"
    status, out, _ = run(capsys, "explain", folder, prompt, "--token", " dog", "-n", 3)
    assert status == 0 and "' dog'" in out and "neurons at positions restore 80%" in out
    status, out, _ = run(capsys, "explain", folder, prompt, "--token", " dog", "-n", 2, "--no-measure", "--json")
    found = json.loads(out)
    expected = explain(load_model(folder, surface=None), prompt, token=" dog", n=2, measure=False)
    assert [one["neuron"] for one in found["neurons"]] == [str(one.neuron) for one in expected]
    assert found["curve"] is None and found["neurons"][0]["effect"] is None
    for wrong, message in (
        (["--token", " xyzzy!"], "token ' xyzzy!': expected one token"),
        (["--rule", "lrp"], "rule: expected one of"),
        (["--lens", "/no/such/lens"], "/no/such/lens"),
    ):
        status, _, err = run(capsys, "explain", folder, prompt, "--no-measure", *wrong)
        assert status == 1 and message in err.splitlines()[-1]


def test_decode_writes_a_map_of_a_trained_model(capsys, tmp_path, stories_path):
    path = tmp_path / "stories.safetensors"
    status, out, _ = run(capsys, "decode", stories_path, "-o", path, "-k", 5, "--side", "out", "--token", " the")
    assert status == 0 and "5 layers x 172 neurons" in out and str(path) in out
    loaded = NeuronMap.load(path)
    assert loaded.side == "out" and loaded.k == 5 and list(loaded.tracked) == [" the"]
    status, out, _ = run(capsys, "show", path, "L4N3")
    assert status == 0 and "L4N3" in out


def test_bench(capsys):
    argv = ["bench", "--neurons", 16, "--d-model", 32, "--d-vocab", 300, "--rounds", 1]
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "matrix product alone" in out and "plain definition" in out
    records = json.loads(run(capsys, *argv, "--json")[1])
    ours = {record["contender"]: record for record in records}["tl_flash"]
    assert ours["over_decode"] == 1 and ours["directions_per_second"] == pytest.approx(16 / ours["seconds"])
    assert {record["contender"]: record["directions_per_second"] for record in records}[
        "preparing the unembedding"
    ] is None
    for wrong, message in ((["--neurons", 0], "n: expected 1"), (["--dtype", "int8"], "dtype: expected one of")):
        status, _, err = run(capsys, "bench", *wrong)
        assert status == 1 and message in err


ASCII = {
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "HF_HUB_OFFLINE": "1",
    "PATH": os.environ["PATH"],
}


def from_an_ascii_console(*command, **variables):
    environment = (
        ASCII | variables | {name: os.environ[name] for name in ("PYTHONPATH", "VIRTUAL_ENV") if name in os.environ}
    )
    command = [sys.executable, "-W", "ignore", "-m", "tl_flash", *map(str, command)]
    return subprocess.run(command, capture_output=True, env=environment, check=False)


def test_a_console_that_cannot_show_a_token_shows_its_escape(tmp_path):
    tokens = [" dog", " café", "狗", "🐕", *(f"w{id}" for id in range(60))]
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="w0"))
    W_U = torch.eye(64)
    neurons = decode_directions(
        torch.eye(64)[:4], W_U, k=1, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    )
    neurons.save(tmp_path / "map.safetensors")
    show = ["show", tmp_path / "map.safetensors", "L0N1", "L0N2", "L0N3"]
    windows = from_an_ascii_console(*show, PYTHONIOENCODING="cp1252")
    assert windows.returncode == 0, windows.stderr
    assert b"caf\xe9" in windows.stdout and b"\\u72d7" in windows.stdout and b"\\U0001f415" in windows.stdout
    assert from_an_ascii_console(*show).returncode == 0


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    folder = shutil.copytree(demo.path("base"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"note": "écrit à la main"}
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    done = from_an_ascii_console("decode", folder, "-o", tmp_path / "map.safetensors", "--layer", 0, "-k", 1)
    assert done.returncode == 0, done.stderr
    assert NeuronMap.load(tmp_path / "map.safetensors").source.model == str(folder)
