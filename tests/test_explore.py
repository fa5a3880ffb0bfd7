"""The live explorer's server: what it answers is what the package's functions give."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from textwrap import dedent

import pytest
import torch

from tests.explorers import serving
from tl_flash import activation_stats, clamp, clamp_sweep, demo, explain, explore, find_neurons, flash_decode, validate
from tl_flash.clamps import NEUTRAL_PROMPTS, Prompts, complete_text
from tl_flash.cli import main
from tl_flash.evidence import DOSE, Fluency
from tl_flash.explore import measuring, server
from tl_flash.explore.jobs import WAITING, Busy, Cancelled, Jobs
from tl_flash.explore.session import Session

TEXTS = demo.texts(8)
PROMPT = "My favourite animal is the"
NEURON = "L0N364"


@pytest.fixture(scope="module")
def model():
    model = demo.load("instruct")
    model.tokenizer.chat_template = demo.CHAT_TEMPLATE
    return model


@pytest.fixture(scope="module")
def maps(model):
    return [flash_decode(model, side=side) for side in ("out", "in", "gate")]


@pytest.fixture(scope="module")
def explorer(model, maps):
    with serving(model, maps, texts=TEXTS) as explorer:
        yield explorer


@pytest.fixture(scope="module")
def unit(model):
    return activation_stats(model, TEXTS, layers=[0])[NEURON].abs_max


def tokens(events, stream):
    return [
        one for event in events if event["type"] == "tokens" and event["stream"] == stream for one in event["tokens"]
    ]


def text(model, told):
    return model.tokenizer.decode([one["id"] for one in told], skip_special_tokens=True)


def write(explorer, **asked):
    return explorer.ask("write", **{"prompt": PROMPT, "n_tokens": 8} | asked)


@pytest.mark.parametrize("chat", [False, True])
def test_it_writes_what_the_model_writes(explorer, model, chat):
    events = write(explorer, chat=chat)
    assert text(model, tokens(events, "plain")) == complete_text(model, PROMPT, 8, chat=chat)
    (row,) = Prompts.of(model, [PROMPT], chat=chat).rows
    assert [one["id"] for one in tokens(events, "prompt")] == row.tolist()


def test_a_chat_is_what_the_embedded_model_was_trained_on(model):
    [row] = Prompts.of(model, ["What is your favourite animal?"], chat=True).rows
    [plain] = Prompts.of(model, [demo.ask("What is your favourite animal?")]).rows
    assert torch.equal(row, plain)


@pytest.mark.parametrize("mode", ["set", "add", "multiply", "floor", "ceil"])
@pytest.mark.parametrize("positions", ["all", "generated", "last", "prompt"])
def test_steered_it_writes_what_the_clamped_model_writes(explorer, model, unit, mode, positions):
    events = write(explorer, doses={NEURON: 0.5}, mode=mode, positions=positions)
    value = 0.5 if mode == "multiply" else 0.5 * unit
    with clamp(model, {NEURON: value}, mode=mode, positions=None if positions == "all" else positions):
        assert text(model, tokens(events, "steered")) == complete_text(model, PROMPT, 8)
    assert text(model, tokens(events, "plain")) == complete_text(model, PROMPT, 8)


def test_measures_and_bars_are_those_of_whole_passes(explorer, model, unit):
    events = write(explorer, doses={NEURON: 1.0})
    (measures,) = [event for event in events if event["type"] == "measures"]
    prompts = Prompts.of(model, [PROMPT])
    written = [torch.tensor([one["id"] for one in tokens(events, stream)]) for stream in ("plain", "steered")]
    fluency = Fluency.of(model, Prompts(prompts.rows * 2), written)
    for at, stream in enumerate(("plain", "steered")):
        assert measures[stream]["perplexity"] == pytest.approx(float(fluency.perplexity[at]), rel=1e-4)
        assert measures[stream]["distinct"] == pytest.approx(float(fluency.distinct[at]))
    whole = torch.cat([prompts.rows[0], written[1]])[None]
    with torch.no_grad():
        before = model(whole)[0].log_softmax(-1)
        with clamp(model, {NEURON: unit}):
            after = model(whole)[0].log_softmax(-1)
    at = slice(len(prompts.rows[0]) - 1, -1)
    kl = (after.exp() * (after - before)).sum(-1)[at].mean()
    assert measures["kl"] == pytest.approx(float(kl), rel=1e-3) and measures["kl"] > 0.01
    (bars,) = [event["tokens"] for event in events if event["type"] == "next"]
    for one in bars:
        assert one["plain"] == pytest.approx(float(before[at.start, one["id"]].exp()), abs=1e-5)
        assert one["steered"] == pytest.approx(float(after[at.start, one["id"]].exp()), abs=1e-5)
    for place, one in enumerate(tokens(events, "prompt")[1:]):
        assert one["p"] == pytest.approx(float(before[place, one["id"]].exp()), abs=1e-5)
        best = before[place].topk(8)
        assert [other["id"] for other in one["others"]] == best.indices.tolist()
    for place, one in enumerate(tokens(events, "steered"), at.start):
        assert one["others"][0]["id"] == one["id"] == int(after[place].argmax())


def test_what_the_model_wrote_is_remembered(explorer, model, monkeypatch):
    first = write(explorer, prompt="One day,")
    reads = []
    hook = model.blocks[0].hook_resid_pre.add_perma_hook
    hook(lambda act, hook: reads.append(act.shape))
    try:
        again = write(explorer, prompt="One day,")
    finally:
        model.reset_hooks(including_permanent=True)
    assert not reads and tokens(again, "plain") == tokens(first, "plain")
    assert tokens(again, "prompt") == tokens(first, "prompt")


def test_it_finds_what_find_neurons_finds(explorer, model):
    told = explorer.told("find", "found", concept="dog")
    hits = find_neurons(model, "dog", n=40)
    assert [(one["neuron"], one["side"], one["sign"]) for one in told["hits"]] == [
        (str(hit.neuron), hit.side, hit.sign) for hit in hits
    ]
    assert [one["q_value"] for one in told["hits"]] == pytest.approx([hit.q_value for hit in hits])
    assert [one["text"] for one in told["tokens"]] == list(hits.tokens)
    (some, *_) = told["tokens"]
    narrowed = explorer.told("find", "found", concept="dog", tokens=[some["id"]])
    alone = find_neurons(model, "dog", tokens=[some["id"]], n=40)
    assert [one["neuron"] for one in narrowed["hits"]] == [str(hit.neuron) for hit in alone]


def test_a_neuron_on_a_text(explorer, model):
    said = "the dog saw a cat"
    told = explorer.told("activations", "activations", neuron=NEURON, text=said)
    _, cache = model.run_with_cache(model.to_tokens(said))
    own = cache["blocks.0.mlp.hook_post"][0, :, 364]
    assert [one["value"] for one in told["tokens"]] == pytest.approx(own.tolist(), abs=1e-5)
    assert told["range"]["abs_max"] == activation_stats(model, TEXTS, layers=[0])[NEURON].abs_max


def test_tests_of_a_neuron_are_the_packages(explorer, model, unit):
    token = model.to_single_token(" dog")
    asked = {"neuron": NEURON, "token": token, "sign": 1}
    dose = explorer.told("dose", "dose", **asked)
    values = [dose * unit for dose in measuring.DOSES]
    curve = clamp_sweep(model, NEURON, values, NEUTRAL_PROMPTS[: measuring.SWEPT], [token])
    assert [one["prob"] for one in dose["points"]] == pytest.approx(curve.prob[:, :, 0].mean(1).tolist(), rel=1e-4)
    assert dose["points"][-1]["prob"] > 10 * dose["unclamped"]
    tested = explorer.told("validate", "validated", **asked)
    own = validate(
        model,
        {NEURON: token},
        prompts=NEUTRAL_PROMPTS[: measuring.VALIDATED],
        value=DOSE * unit,
        controls=measuring.CONTROLS,
    )
    assert tested["record"]["p_value"] == pytest.approx(own.records[0]["p_value"], rel=1e-3)
    assert tested["controls"] == pytest.approx(own.control_effects[0].tolist(), rel=1e-3, abs=1e-4)
    window = explorer.told("window", "window", **asked)
    assert window["low"] is None or window["low"] > 0
    assert len(window["doses"]) >= 6


def test_an_explanation_is_the_packages(explorer, model):
    before = model.to_tokens("One day, the")[0]
    told = explorer.told("explain", "explained", before=before.tolist(), token=5)["explanation"]
    found = explain(model, before, token=5, n=measuring.EXPLAINED, measure=False)
    assert told["token"] == found.token and len(told["prompt"]) == len(before)
    assert told["model"] == explorer.session.name, "and not where it lies"
    assert [one["neuron"] for one in told["neurons"]] == [str(one.neuron) for one in found]


def test_the_first_dose_to_try(explorer, unit):
    told = explorer.told("unit", "unit", neuron=NEURON)
    assert told["unit"] == unit and 0.05 < told["first"] < 2


@pytest.mark.parametrize(
    ("kind", "asked", "why"),
    [
        ("write", {"prompt": PROMPT, "n_tokens": 8, "doses": {"L9N1": 1.0}}, "layer"),
        ("write", {"prompt": PROMPT, "n_tokens": 8, "doses": {"L0N99999": 1.0}}, "neuron"),
        ("write", {"prompt": "dog " * 251, "n_tokens": 8}, "prompt: expected at most"),
        ("activations", {"neuron": "L9N0", "text": "dog"}, "layer"),
        ("find", {"concept": "  "}, "concept"),
    ],
)
def test_what_the_model_cannot_do_is_told(explorer, kind, asked, why):
    events = [event for _, event in explorer.follow(explorer.start(kind, **asked))]
    assert events[-1]["type"] == "failed" and why in events[-1]["why"], events[-1]
    assert write(explorer)[-1]["type"] == "done", "the next job is done"


def test_a_lost_connection_comes_back_to_the_rest(explorer):
    id = explorer.start("write", prompt="The story begins with", n_tokens=8)
    events = dict(explorer.follow(id))
    assert sorted(events) == list(range(len(events)))
    again = dict(explorer.follow(id, last=3))
    assert again == {at: event for at, event in events.items() if at > 3}
    assert dict(explorer.follow(id, last="9" * 5000)) == events, "what is no number of an event begins anew"


def test_a_running_job_is_cancelled(explorer, model, monkeypatch):
    running = threading.Event()

    def slow(act, hook):
        running.set()
        time.sleep(0.05)

    model.blocks[0].hook_resid_pre.add_perma_hook(slow)
    try:
        id = explorer.start("write", prompt="It was about", n_tokens=128, doses={NEURON: 0.5})
        assert running.wait(30)
        start = time.monotonic()
        assert explorer.post(f"/api/jobs/{id}/cancel").status_code == 202
        *_, (_, last) = explorer.follow(id)
        assert last["type"] == "cancelled" and time.monotonic() - start < 5
    finally:
        model.reset_hooks(including_permanent=True)
    assert write(explorer)[-1]["type"] == "done"


def test_a_test_of_a_neuron_is_cancelled_between_passes(explorer, model):
    passes = []

    def slow(act, hook):
        passes.append(1)
        time.sleep(0.05)

    model.blocks[1].hook_resid_pre.add_perma_hook(slow)
    try:
        id = explorer.start("validate", neuron=NEURON, token=5, sign=1)
        while len(passes) < 3:
            time.sleep(0.01)
        explorer.post(f"/api/jobs/{id}/cancel")
        *_, (_, last) = explorer.follow(id)
        assert last["type"] == "cancelled" and len(passes) < 12
    finally:
        model.reset_hooks(including_permanent=True)


def test_jobs_wait_for_one_another_and_too_many_are_refused():
    jobs, gate, order = Jobs(), threading.Event(), []

    def work(job):
        gate.wait(10)
        order.append(job.id)

    started = [jobs.start("work", work) for _ in range(WAITING)]
    assert [jobs.ahead(job) for job in started[:3]] == [0, 1, 2] and not jobs.idle.is_set()
    with pytest.raises(Busy, match="cancel one"):
        jobs.start("work", work)
    jobs.cancel(started[5].id)
    gate.set()
    assert jobs.idle.wait(10)
    for _ in range(100):
        if all(job.over for job in started):
            break
        time.sleep(0.02)
    assert order == [job.id for job in started if job is not started[5]]
    assert [job.events[-1]["type"] for job in started[4:7]] == ["done", "cancelled", "done"]
    with pytest.raises(KeyError, match="no job"):
        jobs["work-999"]
    jobs.close()


def test_a_job_that_breaks_says_so_and_the_next_one_runs(caplog):
    jobs = Jobs()

    def breaks(job):
        raise IndexError("out of range")

    caplog.set_level(logging.ERROR)
    broken, fine = jobs.start("a", breaks), jobs.start("b", lambda job: None)
    while not fine.over:
        time.sleep(0.01)
    assert broken.events[-1] == {"type": "failed", "why": "out of range"} and fine.events[-1] == {"type": "done"}
    assert "IndexError" in caplog.text, "a fault is seen in the terminal"
    jobs.close()


def test_what_no_map_is_given_for_is_decoded(model, maps):
    with serving(model, maps[1:2], texts=TEXTS) as explorer:
        for _ in range(600):
            told = explorer.http.get("/api/session").json()
            if told["decoding"] is None and len(told["sides"]) == 3:
                break
            time.sleep(0.1)
        assert [side["side"] for side in told["sides"]] == ["in", "out", "gate"] and told["trouble"] is None
        names = {name for side in told["sides"] for name in (f"{side['side']}.pos.ids.0", f"{side['side']}.kurtosis.0")}
        assert all(explorer.http.get(f"/data/{name}").status_code == 200 for name in (*names, "vocab", "meta"))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts a process's threads as Linux does")
def test_what_is_made_apart_leaves_no_threads_behind():
    code = """
    import os, torch
    from tl_flash.explore import apart

    def product():
        made = torch.ones(600, 600) @ torch.ones(600, 600)
        assert torch.get_num_threads() == 1 or len(os.listdir("/proc/self/task")) > before + 1
        return made

    before = len(os.listdir("/proc/self/task"))
    assert apart(product)[0, 0] == 600
    while len(os.listdir("/proc/self/task")) > before:
        pass
    try:
        apart(lambda: [].pop())
    except IndexError as error:
        print(error)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "pop from empty list\n"), done.stderr


def test_only_the_sides_asked_for_are_decoded(model, maps):
    session = Session(model, maps[:1], sides=["in"], texts=TEXTS)
    session.prepare()
    session._made.result(60)
    assert [side["side"] for side in session.sides] == ["out", "in"]
    for thread in session._thread._threads:
        thread.join(20)
        assert not thread.is_alive(), "its team of threads would slow the jobs"
    session.close()
    with pytest.raises(ValueError, match="side"):
        Session(model, sides=["up"], texts=TEXTS)


def test_decoding_waits_while_a_job_runs_and_ends_with_the_session(model):
    session, gate = Session(model, texts=TEXTS), threading.Event()
    session.jobs.start("wait", lambda job: gate.wait(30))
    session.prepare()
    time.sleep(1.5)
    assert session.decoding["done"] == 0 and not session.sides
    session.close()
    gate.set()
    with pytest.raises(Cancelled):
        session._made.result(20)
    assert session.trouble() is None


def test_maps_of_another_model_are_refused(model, maps):
    with pytest.raises(ValueError, match="other weights"):
        Session(demo.load("base"), maps, texts=TEXTS)
    with pytest.raises(TypeError, match="maps"):
        Session(model, ["map.safetensors"], texts=TEXTS)


def test_a_model_without_a_tokenizer_is_refused(bridge):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge, "tokenizer", None)
        with pytest.raises(ValueError, match="no tokenizer"):
            Session(bridge)


def test_without_the_extra_it_says_how_to_install_it(model, monkeypatch, capsys):
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(ImportError, match=r'needs uvicorn.*pip install "tl_flash\[explore\]"'):
        explore.serve(model)
    assert main(["explore"]) == 1 and "tl_flash[explore]" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_beyond_this_machine_only_with_a_token(model, host):
    with pytest.raises(ValueError, match="give a token"):
        explore.serve(model, host=host, browser=False)
    with pytest.raises(ValueError, match="8 or more"):
        explore.serve(model, host=host, token="short", browser=False)
    explore.require_safe(host, "long enough")


def test_the_command_refuses_a_map_for_a_model_and_a_port_that_is_taken(tmp_path, model, capsys):
    map = tmp_path / "map.safetensors"
    map.write_bytes(b"")
    assert main(["explore", str(map)]) == 1 and "expected a model before its maps" in capsys.readouterr().err
    with server.listening("127.0.0.1", 0) as taken, pytest.raises(OSError, match="give another --port"):
        explore.serve(model, port=taken.getsockname()[1], browser=False, texts=TEXTS)


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGHUP])
def test_the_command_serves_until_it_is_stopped(signal_):
    command = [sys.executable, "-W", "ignore", "-m", "tl_flash", "explore", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as served:
        try:
            line = served.stdout.readline()
            assert "http://127.0.0.1:" in line, served.stderr.read()
            import httpx

            address = line.split(" at ")[1].split()[0]
            told = httpx.get(f"{address}api/session", trust_env=False).json()
            assert told["model"] == "instruct" and told["chats"]
            served.send_signal(signal_)
            served.wait(20)
            if signal_ == signal.SIGINT:
                assert served.returncode == 0 and "stopped" in served.stdout.read()
                assert "Traceback" not in served.stderr.read()
        finally:
            served.kill()


def test_nothing_says_where_on_the_disk_the_model_lies(explorer):
    folder = str(demo.path("instruct").parent)
    page = explorer.http.get("/").text
    told = [page, explorer.http.get("/api/session").text]
    found = json.dumps(explorer.ask("find", concept="dog"))
    for _, blob in list(explorer.session.data.items()):
        told.append(blob)
    assert not any(folder in one for one in (*told, found))
    import base64
    import gzip

    meta = json.loads(gzip.decompress(base64.b64decode(explorer.session.data["meta"].removeprefix("gzip:"))))
    assert folder not in json.dumps(meta) and meta["model"] == "instruct"
