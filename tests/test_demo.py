"""The embedded pair and the tour through it."""

import contextlib
import io
import subprocess
import sys

import pandas as pd
import pytest

from tl_flash import NeuronMap, demo
from tl_flash.cli import main
from tl_flash.demo.tour import named_concepts


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What `tl-flash demo` says, and where it writes."""
    out, said = tmp_path_factory.mktemp("demo") / "output", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["demo", "--out", str(out)]) == 0
    return said.getvalue(), out


def test_the_tour_goes_through_the_whole_method(told):
    text, out = told
    for part in ("1. Decode", "2. Find", "3. Clamp", "4. Ask", "5. Compare", "W_in label alone"):
        assert part in text
    assert "nan" not in text
    written = {path.name for path in out.iterdir()}
    assert {"base-in.safetensors", "base-out.csv", "dog-dose.html", "dog-by-layer.html", "base-instruct.csv"} <= written


def test_it_refuses_a_file_in_the_way(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["demo", "--out", str(tmp_path / "taken")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_it_says_what_its_files_hold(told):
    text, out = told
    neurons = NeuronMap.load(out / "base-out.safetensors")
    assert str(neurons.find(" dog", n=3)) in text
    table = pd.read_csv(out / "base-out.csv", keep_default_na=False)
    assert len(table) == 2 * len(neurons) and table["token"].tolist() == neurons.to_frame()["token"].tolist()
    favourites = pd.read_csv(out / "favourite-animal.csv")
    count = int(favourites["mentions_after"].sum())
    assert f"{int(favourites['mentions_before'].sum())} of 10 before, {count} of 10 after" in text


def test_named_concepts_are_above_the_null(told):
    neurons = NeuronMap.load(told[1] / "base-out.safetensors")
    named = named_concepts(neurons)
    for word, hit in named.items():
        assert hit.token == f" {word}" and hit.rank == 0
        assert hit.z > float(neurons.null.quantile()[neurons.row(hit.neuron)])
    assert "dog" in named


def test_coherent_neurons_write_what_they_read(told):
    neurons = NeuronMap.load(told[1] / "base-in.safetensors")
    bars = neurons.null.quantile()
    specialised = neurons.specialised(len(neurons), by="coherence")
    coherent = specialised.coherent()
    assert coherent
    assert [hit for hit in specialised if abs(hit.write_z) > float(bars[neurons.row(hit.neuron)])] == list(coherent)
    with pytest.raises(ValueError, match="side 'out'"):
        NeuronMap.load(told[1] / "base-out.safetensors").specialised(3).coherent()


def test_the_tour_goes_through_any_model(tmp_path, capsys):
    assert main(["demo", "--model", str(demo.path("instruct")), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for part in ("1. Decode", "2. Find", "3. Clamp", "5. Do labels hold?", "6. The lens", "through the lens"):
        assert part in said
    assert "4. Not asked for its favourite animal: its tokenizer has no chat template" in said
    written = {path.name for path in tmp_path.iterdir()}
    assert {
        "lens.safetensors",
        "in.csv",
        "dog-dose.html",
        "dog-by-layer.html",
        "labels-gate.csv",
        "lens-check.csv",
    } <= written
    assert "token" in pd.read_csv(tmp_path / "lens.csv").columns


def test_a_surface_without_a_model_is_refused(tmp_path, capsys):
    assert main(["demo", "--surface", "bridge", "--out", str(tmp_path / "out")]) == 1
    assert "--model" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", demo.MODELS)
def test_loading_needs_no_network(name):
    code = (
        "import socket\n"
        "import transformer_lens, transformers\n"
        "from tl_flash import demo\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        f"print(demo.load({name!r}).cfg.n_layers)"
    )
    environment = {"PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout.splitlines()[-1]) >= 4


def test_no_texts_are_refused():
    with pytest.raises(ValueError, match="1 text or more"):
        demo.texts(0)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="'base', 'instruct'"):
        demo.load("chat")
