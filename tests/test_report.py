"""The explorer page, as a browser shows it."""

import base64
import dataclasses
import gzip
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from tests.browser import chromium, needs_browser, opened, seconds_to_answer
from tl_flash import (
    compare,
    concepts,
    decode_directions,
    demo,
    explain,
    find_neurons,
    flash_decode,
    plots,
    report,
    validate,
)
from tl_flash.cli import main
from tl_flash.show.report import layout, pack

HOSTILE = [
    "<script>alert('run')</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "<!--<script>",
    "]]>",
    " \u202egod",
    "\u200f\u05d0\u05d1",
    "\x00",
    "\x1b[31m",
    "\u2028",
    "<0x0A>",
    "\ufffd",
    "\ufffd",
    "\u0301",
    "javascript:alert(3)",
    "&lt;b&gt;",
    "${alert(4)}",
    "",
    "\ue000",
    "\n",
    "'\"`",
    "%{text}",
]


class Hostile:
    def get_vocab(self):
        return {f"{id}": id for id in range(len(HOSTILE))}

    def batch_decode(self, ids, **_):
        return [HOSTILE[id] for [id] in ids]


@pytest.fixture(scope="module")
def models():
    return demo.load("base"), demo.load("instruct")


@pytest.fixture(scope="module")
def maps(models):
    return {(name, side): flash_decode(model, side=side, tokens=[" dog"] if side == "out" else None)
            for name, model in zip(demo.MODELS, models, strict=True) for side in ("in", "out")}  # fmt: skip


@pytest.fixture(scope="module")
def validation(models, maps):
    return validate(models[0], maps["base", "out"].specialised(2), prompts=["One day,", "The"], controls=3)


@pytest.fixture(scope="module")
def page(maps, validation, tmp_path_factory):
    sides = ("out", "in")
    return report.write(
        [maps["base", side] for side in sides],
        tmp_path_factory.mktemp("report") / "page.html",
        compare=[compare(maps["base", side], maps["instruct", side]) for side in sides],
        validation=validation,
    )


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


def type_in(driver, text):
    box = driver.find_element("id", "query")
    box.clear()
    box.send_keys(text)


def press(driver, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def shown(driver):
    """The neurons in the list, from the top of the window."""
    return [cell.text for cell in driver.find_elements("css selector", ".row .cell.neuron")]


def errors(driver):
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def requests(driver):
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "blob:", "about:"))]


def in_page(driver, expression):
    return driver.execute_script(f"return {expression}")


KEYS = {
    "z": lambda hit: hit.z,
    "prob": lambda hit: hit.prob,
    "write": lambda hit: abs(hit.write_z),
    "coherence": lambda hit: min(hit.z, abs(hit.write_z)),
}


@needs_browser
@pytest.mark.parametrize("side", ["out", "in"])
def test_a_search_gives_the_neurons_that_find_gives(browser, page, maps, side):
    opened(browser, page, f"#side={side}")
    type_in(browser, " dog")
    for by, key in KEYS.items():
        seconds_to_answer(browser, " dog", order=by)
        hits = maps["base", side].find(" dog", n=1000, by=by)
        assert shown(browser)[0] == str(hits[0].neuron)
        assert f"{len(hits)} found with" in browser.find_element("id", "status").text
        assert browser.find_element("css selector", ".row .cell.z").text == f"{hits[0].z:.2f}"
        listed = browser.execute_script(
            "const key = page.search.key(arguments[0]), parts = [...page.hits].map((hit) => page.search.parts(hit));"
            "return parts.map(({ pole, at }) => key(pole, at))",
            by,
        )
        assert listed == pytest.approx([key(hit) for hit in hits], rel=2e-3, abs=1e-3)


def chips(driver):
    return {
        chip.find_element("css selector", ".token").text: chip for chip in driver.find_elements("css selector", ".chip")
    }


@needs_browser
def test_a_word_is_searched_by_its_tokens_which_are_switched_off_by_chips(browser, maps, tmp_path):
    neurons = maps["base", "out"]
    opened(browser, report.write(neurons, tmp_path / "page.html", figures=()))
    forms = [name for name in neurons.vocab.names if name.strip().lower() in ("dog", "dogs")]
    held = {form: {(h.neuron, h.pole) for h in neurons.find(form, n=10_000)} for form in forms}
    held = {form: hits for form, hits in held.items() if hits}
    assert len(held) > 1, "else this test shows nothing"
    type_in(browser, "Dog")
    assert set(chips(browser)) == {form.replace(" ", "·") for form in held}
    assert browser.find_element("id", "status").text.startswith(f"{len(set.union(*held.values()))} found with")
    best = max((hit for form in held for hit in neurons.find(form, n=1)), key=lambda hit: hit.z)
    assert shown(browser)[0] == str(best.neuron)
    for form in [form for form in held if form != " dog"]:
        chips(browser)[form.replace(" ", "·")].click()
    assert browser.find_element("id", "status").text.startswith(f"{len(held[' dog'])} found with ·dog ")
    assert chips(browser)["·dog"].get_attribute("aria-pressed") == "true"
    chips(browser)["·dog"].click()
    assert "no token of it is switched on" in browser.find_element("id", "status").text and shown(browser) == []
    type_in(browser, "xyzzy")
    assert "no token" in browser.find_element("id", "status").text and not chips(browser)
    type_in(browser, "dog")
    assert len(shown(browser)) > 1, "another query switches all of its tokens on"
    assert errors(browser) == []


@needs_browser
def test_a_concept_of_the_page_is_ranked_in_full(browser, maps, models, tmp_path):
    table = concepts(models[0], ["dog", "house"], sides=["in", "out"])
    sides = [maps["base", side] for side in ("out", "in")]
    single = find_neurons(models[0], "cat", side="out")
    opened(browser, report.write(sides, tmp_path / "page.html", concepts=[table, single], figures=()))
    for side in ("out", "in"):
        opened(browser, tmp_path / "page.html", f"#side={side}&q=House")
        best = table.hits("house", side=side)
        assert shown(browser)[:8] == [str(hit.neuron) for hit in best[:8]]
        assert browser.find_element("css selector", ".row .cell.concept").text == f"{best[0].z:+.2f}".replace("-", "−")
        assert browser.find_element("css selector", "#head .concept").get_attribute("aria-sort") == "descending"
        assert f"{table.z.shape[2]:,} neurons by their mean z" in browser.find_element("id", "status").text
        assert len(chips(browser)) == len(table.tokens[1])
    next(iter(chips(browser).values())).click()
    assert (
        "found with" in browser.find_element("id", "status").text
        or "switched on" in browser.find_element("id", "status").text
    )
    opened(browser, tmp_path / "page.html", "#side=in&q=cat")
    assert not browser.find_elements("css selector", ".cell.concept"), "it was not searched on this side"
    assert errors(browser) == []


@needs_browser
def test_a_map_through_a_lens_made_on_the_way(browser, models, tmp_path):
    through = flash_decode(models[0], side="out", lens="auto")
    table = concepts(models[0], ["dog"], sides=["lens"], lens="auto")
    tested = validate(models[0], through.specialised(2), prompts=["One day,", "The"], controls=3, lens="auto")
    page = report.write(through, tmp_path / "page.html", concepts=table, validation=tested, figures=())
    best = [str(hit.neuron) for hit in table.hits("dog", side="lens")[:8]]
    opened(browser, page, f"#q=dog&neuron={best[0]}")
    assert shown(browser)[:8] == best
    assert "through a lens" in browser.find_element("tag name", "body").text
    assert errors(browser) == []


@needs_browser
def test_without_a_query_the_order_is_that_of_specialised(browser, page, maps):
    opened(browser, page)
    best = maps["base", "out"].specialised(20)
    assert shown(browser)[:20] == [str(hit.neuron) for hit in best]
    browser.find_element("css selector", "#filters button").click()
    assert browser.find_element("id", "status").text == f"{maps['base', 'out'].n_specialised()} neurons"


@needs_browser
def test_sorting_by_a_column(browser, page, maps):
    opened(browser, page)
    browser.find_element("css selector", "#head .kurtosis button").click()
    kurtosis = maps["base", "out"].kurtosis
    best = int(kurtosis.argmax())
    assert shown(browser)[0] == f"L{best // kurtosis.shape[1]}N{best % kurtosis.shape[1]}"
    assert browser.find_element("css selector", "#head .kurtosis").get_attribute("aria-sort") == "descending"


@needs_browser
def test_layers_neurons_ids_and_nothing(browser, page, maps):
    opened(browser, page)
    type_in(browser, "L3N17")
    assert shown(browser) == ["L3N17"]
    type_in(browser, "layer 2")
    assert browser.find_element("id", "status").text == f"all {maps['base', 'out'].d_mlp:,} neurons of layer 2"
    assert all(name.startswith("L2N") for name in shown(browser))
    id = maps["base", "out"].vocab.id(" dog")
    type_in(browser, f"#{id}")
    assert shown(browser)[0] == str(maps["base", "out"].find(" dog")[0].neuron)
    type_in(browser, "L9")
    assert "no layer 9" in browser.find_element("id", "status").text and shown(browser) == []
    type_in(browser, "xyzzy")
    assert "no token" in browser.find_element("id", "status").text


@needs_browser
def test_a_neuron_is_opened_and_closed_by_keys(browser, page, maps):
    from selenium.webdriver.common.keys import Keys

    opened(browser, page)
    press(browser, "/")
    assert in_page(browser, "document.activeElement.id") == "query"
    press(browser, " dog", Keys.ARROW_DOWN, Keys.ENTER)
    hits = maps["base", "out"].find(" dog")
    panel = browser.find_element("id", "panel")
    assert panel.find_element("tag name", "h2").text == str(hits[0].neuron)
    reading = maps["base", "out"][hits[0].neuron]
    tokens = [node.text for node in panel.find_elements("css selector", ".pole li .token")]
    assert tokens[0 if hits[0].pole == "positive" else 10] == "·dog" and len(tokens) == 20
    numbers = [node.text for node in panel.find_elements("css selector", ".pole li .number")]
    assert numbers[0] == f"{reading.positive[0].z:.2f}" and numbers[30] == f"{reading.negative[0].z:.2f}"
    press(browser, Keys.ARROW_DOWN)
    assert panel.find_element("tag name", "h2").text == str(hits[1].neuron)
    press(browser, Keys.ESCAPE)
    assert not panel.is_displayed()
    press(browser, Keys.ESCAPE)
    assert in_page(browser, "document.getElementById('query').value") == ""


@needs_browser
def test_a_prompt_leads_to_its_neurons(browser, models, maps, tmp_path):
    found = [explain(models[0], text, token=" dog", n=6) for text in ("My favourite animal is the", "I have a")]
    page = report.write(maps["base", "out"], tmp_path / "page.html", explanations=found, figures=())
    opened(browser, page)
    press(browser, "p")
    prompts = browser.find_element("id", "prompts")
    assert prompts.is_displayed() and not browser.find_element("id", "neurons").is_displayed()
    first, second = prompts.find_elements("css selector", ".prompt")
    assert [chip.text.split("\n")[0] for chip in first.find_elements("css selector", ".chip .token")] == [
        token.replace(" ", "·") for token in found[0].prompt
    ]
    names = [str(one.neuron) for one in found[0]]
    assert [cell.text for cell in first.find_elements("css selector", "td:first-child")] == names
    assert len(second.find_elements("css selector", "tbody tr")) == 6
    position = found[0][0].position
    first.find_elements("css selector", ".chip")[position].click()
    first = prompts.find_elements("css selector", ".prompt")[0]
    here = [str(one.neuron) for one in found[0].at(position)]
    assert [cell.text for cell in first.find_elements("css selector", "td:first-child")] == here
    first.find_element("css selector", "td button").click()
    assert not prompts.is_displayed()
    assert browser.find_element("css selector", "#panel h2").text == here[0] and not errors(browser)


@needs_browser
def test_the_other_model_and_the_clamp_stand_beside_a_neuron(browser, page, maps, validation):
    record = validation.records[0]
    opened(browser, page, f"#neuron={record['neuron']}&side=out")
    text = browser.find_element("id", "panel").text
    assert f"{record['dlogp']:+.2f} nats" in text and "instruct" in text
    comparison = compare(maps["base", "out"], maps["instruct", "out"])
    changed = int((~comparison.same_top).sum())
    browser.find_element("css selector", "#filters button:nth-child(2)").click()
    assert browser.find_element("id", "status").text == f"{changed:,} neurons"
    top = [cell.text for cell in browser.find_elements("css selector", ".row .cell.other")]
    assert all(cell.startswith("→") for cell in top)


@needs_browser
def test_sides_switch_by_key_and_keep_the_query(browser, page, maps):
    opened(browser, page, "#q=+dog&side=out")
    press(browser, "]")
    assert browser.find_element("css selector", "#sides [aria-checked=true]").text == "W_in"
    assert shown(browser)[0] == str(maps["base", "in"].find(" dog")[0].neuron)


@needs_browser
def test_the_list_is_drawn_by_windows(browser, page, maps):
    count = str(len(maps["base", "out"]) + 1)  # the head is a row too
    opened(browser, page)
    assert len(shown(browser)) < 60
    browser.execute_script("document.getElementById('list').scrollTop = 1e9")
    browser.execute_async_script("setTimeout(arguments[0], 100)")
    drawn = browser.find_elements("css selector", ".row")
    assert len(drawn) < 60 and drawn[-1].get_attribute("aria-rowindex") == count
    assert browser.find_element("id", "list").get_attribute("aria-rowcount") == count


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1440, True)])
def test_a_phone_and_the_dark(page, width, dark):
    with chromium(width, 844, dark) as driver:
        opened(driver, page, "#q=+dog")
        assert in_page(driver, "document.documentElement.scrollWidth") <= width, "nothing is cut off"
        background = in_page(driver, "getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
        driver.find_element("css selector", ".row").click()
        panel = driver.find_element("id", "panel")
        assert (panel.size["width"] == width) == (width == 390), "on a phone a neuron takes the whole screen"
        driver.find_element("css selector", "#panel .close").click()
        driver.find_element("id", "switch-theme").click()
        assert in_page(driver, "getComputedStyle(document.body).backgroundColor") != background


@needs_browser
def test_figures_are_drawn_without_a_request(browser, page, maps, tmp_path):
    browser.get_log("performance")
    opened(browser, page)
    browser.find_element("id", "open-figures").click()
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda d: in_page(d, "document.body.dataset.figures"))
    titles = [node.text for node in browser.find_elements("css selector", ".card .gtitle")]
    assert len(titles) == 6 and any("keep their top token" in title for title in titles)
    assert set(requests(browser)) == {page.as_uri()}, "the page itself, and nothing more"
    assert errors(browser) == []


@needs_browser
def test_a_hostile_vocabulary_runs_nothing(browser, tmp_path):
    from selenium.common.exceptions import NoAlertPresentException

    V = len(HOSTILE)
    generator = torch.Generator().manual_seed(0)
    W_U, x = torch.randn(12, V, generator=generator), torch.randn(64, 12, generator=generator)
    neurons = decode_directions(x, W_U, k=V, tokens=[0], tokenizer=Hostile())
    figures = [plots.token_by_layer(neurons, 0), plots.neuron(neurons, "L0N3"), plots.neuron_atlas(x, neurons)]
    path = report.write(neurons, tmp_path / "page.html", title="</title><script>alert(5)</script>", figures=figures)
    browser.get_log("browser")
    opened(browser, path)
    assert in_page(browser, "document.title") == "</title><script>alert(5)</script>"
    told = in_page(browser, "page.names")
    assert told == [*HOSTILE, "<none>"]
    for name in HOSTILE:
        seconds_to_answer(browser, name)
    browser.execute_script("openNeuron(3)")
    texts = [node.text for node in browser.find_elements("css selector", ".pole li .token")]
    assert "<script>alert('run')</script>".replace(" ", "·") in texts
    assert any("U+202E" in text for text in texts) and any("U+0000" in text for text in texts)
    assert any("↵" in text for text in texts) and any("#11" in text for text in texts), "twins tell their ids"
    browser.find_element("id", "open-figures").click()
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda d: in_page(d, "document.body.dataset.figures"))
    assert in_page(browser, "document.querySelectorAll('img, iframe, object, embed, a[href]').length") == 0
    assert in_page(browser, "document.querySelectorAll('script:not([data-blob])').length") == 2, "its own, and plotly"
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert
    assert errors(browser) == []


@needs_browser
def test_that_the_policy_stops_what_would_slip_through(browser, page):
    opened(browser, page)
    browser.execute_script("const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
                           "document.body.append(s)")  # fmt: skip
    assert in_page(browser, "window.ran") is None
    assert any("Content Security Policy" in message for message in errors(browser))


@needs_browser
def test_a_map_of_458752_neurons_opens_and_answers(browser, tmp_path):
    from benchmarks.explorer import synthetic_map

    neurons = synthetic_map(458_752)
    path = report.write(neurons, tmp_path / "page.html")
    assert path.stat().st_size < 90e6
    opened(browser, path)
    assert "458,752 neurons in 32 layers" in browser.find_element("id", "about-map").text
    for query in (" dog", "L31N100", "L31", "word12", ""):
        assert seconds_to_answer(browser, query) < 2, query
    assert seconds_to_answer(browser, "", "kurtosis") < 2
    best = int(neurons.kurtosis.flatten().argmax())
    assert shown(browser)[0] == f"L{best // 14336}N{best % 14336}"
    assert seconds_to_answer(browser, "", "z") < 2 and seconds_to_answer(browser, " dog") < 2
    assert shown(browser)[0] == str(neurons.find(" dog", n=1)[0].neuron)
    assert errors(browser) == []


@needs_browser
def test_a_map_of_cosines_has_no_probabilities(browser, models, tmp_path):
    neurons = flash_decode(models[0], score="cosine", layers=[0, 3])
    opened(browser, report.write(neurons, tmp_path / "page.html", figures=()))
    assert "prob" not in [option.text for option in browser.find_elements("css selector", "#sort option")]
    assert not browser.find_elements("css selector", ".cell.prob") and shown(browser)
    type_in(browser, "L3")
    assert shown(browser)[0].startswith("L3N") and errors(browser) == []


@needs_browser
def test_neurons_of_experts_have_their_names(browser, maps, tmp_path):
    experts = dataclasses.replace(maps["base", "out"], n_experts=4)
    opened(browser, report.write(experts, tmp_path / "experts.html", figures=[]))
    width = experts.d_mlp // 4
    for name in ("L0E0N0", f"L1E3N{width - 1}"):
        type_in(browser, name)
        assert shown(browser) == [name]
    for name in (f"L0E0N{width}", "L0E4N0", "L0N3"):
        type_in(browser, name)
        assert shown(browser) == []
    assert errors(browser) == []


def blobs(path):
    text = path.read_text()
    return dict(re.findall(r'data-blob="([^"]+)">([^<]*)<', text))


def unpacked(blob):
    coded = blob.removeprefix(pack.GZIP)
    data = base64.b64decode(coded)
    return gzip.decompress(data) if blob.startswith(pack.GZIP) else data


def test_what_the_page_carries(maps, tmp_path):
    neurons = maps["base", "in"]
    shape = neurons.positive.ids.shape
    carried = blobs(report.write(neurons, tmp_path / "page.html", figures=()))
    meta = json.loads(unpacked(carried["meta"]))
    [side] = meta["sides"]

    def column(name):
        layout = side["columns"][name]
        dtype = np.dtype(f"<{layout['type']}")
        planes = [np.frombuffer(unpacked(carried[f"in.{name}.{at}"]), np.uint8) for at in range(dtype.itemsize)]
        return np.stack(planes, axis=1).copy().view(dtype)[:, 0] * layout["step"]

    assert (column("pos.ids").reshape(shape) == neurons.positive.ids.numpy()).all()
    assert (column("neg.top_z").reshape(shape[:2]) == neurons.negative.z[..., 0].numpy()).all()
    step = side["columns"]["pos.z"]["step"]
    assert step < 2e-4
    assert np.abs(column("pos.z").reshape(shape) - neurons.positive.z.numpy()).max() <= 0.51 * step
    assert np.abs(column("pos.write_z").reshape(shape) - neurons.positive.write_z.numpy()).max() < 2e-4
    probs = np.exp(column("scale")[:, None] * column("pos.z").reshape(-1, shape[2]) - column("pos.log_z")[:, None])
    assert probs.reshape(shape) == pytest.approx(neurons.positive.probs.numpy(), rel=2e-3)
    assert json.loads(unpacked(carried["vocab"])) == list(neurons.vocab.names)


def test_negative_scores_keep_their_sign():
    column = pack.columns(decode_directions(torch.randn(40, 4), torch.randn(4, 6), k=6))["pos.z"]
    assert column.values.dtype == np.int16 and column.values.min() < 0


def test_the_page_never_parses_markup_of_the_data():
    for name in (*layout.SCRIPTS, "page.html"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|https?://(?!www\.w3\.org)",
            layout.asset(name),
        ), name


def test_refusals(maps, models, validation, tmp_path):
    path, base = tmp_path / "page.html", maps["base", "out"]
    with pytest.raises(TypeError, match="map: expected a NeuronMap"):
        report.write("map.safetensors", path)
    with pytest.raises(ValueError, match="at least one"):
        report.write([], path)
    with pytest.raises(ValueError, match="each side once"):
        report.write([base, base], path)
    with pytest.raises(ValueError, match="sides of one model, got .*base and .*instruct"):
        report.write([base, maps["instruct", "in"]], path)
    with pytest.raises(ValueError, match="compare: expected comparisons whose first map"):
        report.write(base, path, compare=compare(maps["instruct", "out"], base))
    with pytest.raises(ValueError, match='validation: expected side in, got "out"'):
        report.write(maps["base", "in"], path, validation=validation)
    with pytest.raises(ValueError, match="q_value missing"):
        report.write(base, path, validation=validation.to_frame().drop(columns="q_value"))
    with pytest.raises(ValueError, match="is no positive top token|is no negative top token"):
        report.write(base, path, validation=validation.to_frame().assign(token=" xyzzy"))
    with pytest.raises(TypeError, match="validation: expected a Validation"):
        report.write(base, path, validation=5)
    table = concepts(demo.path("base"), ["dog"], layers=[0])
    with pytest.raises(ValueError, match="concepts: expected a search in .*base, got one in another"):
        report.write(base, path, concepts=dataclasses.replace(table, model="another"))
    with pytest.raises(ValueError, match=r"concepts: expected a search in layers \[0, 1, 2, 3\]"):
        report.write(base, path, concepts=dataclasses.replace(table, model=base.source.model))
    whole = concepts(demo.load("base"), ["dog"], sides=["out"])
    with pytest.raises(ValueError, match="concepts: expected each once"):
        report.write(base, path, concepts=[whole, whole["dog"]])
    with pytest.raises(TypeError, match="concepts: expected what concepts"):
        report.write(base, path, concepts=["dog"])
    with pytest.raises(ValueError, match="explanations: expected prompts to"):
        report.write(base, path, explanations=explain(models[1], "I have a", n=2, measure=False))
    with pytest.raises(TypeError, match="explanations: expected a Explanation or a list of them"):
        report.write(base, path, explanations=["I have a"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        report.write(base, tmp_path / "nowhere" / "page.html")
    assert not list(tmp_path.iterdir())


def test_the_command(maps, validation, tmp_path, capsys):
    paths = {key: tmp_path / f"{'-'.join(key)}.safetensors" for key in maps}
    for key, path in paths.items():
        maps[key].save(path)
    records = tmp_path / "validation.json"
    validation.to_frame().to_json(records, orient="records")
    page = tmp_path / "page.html"
    given = [str(paths["base", "out"]), "--compare", str(paths["instruct", "out"]), "--validation", str(records)]
    assert main(["report", *given, "-o", str(page), "--no-figures", "--title", "Two models"]) == 0
    assert f"wrote {page}" in capsys.readouterr().out.replace("\n", "")
    meta = json.loads(unpacked(blobs(page)["meta"]))
    assert meta["title"] == "Two models" and meta["figures"] == 0
    assert meta["sides"][0]["other"]["model"] == "instruct"
    assert [r["neuron"] for r in meta["sides"][0]["validated"]] == [r["neuron"] for r in validation.records]
    assert main(["report", str(paths["base", "out"]), "--concept", "dog", "-o", str(page)]) == 1
    assert "expected it and --model together" in capsys.readouterr().err
    own = flash_decode(demo.path("base"), layers=[0, 1, 2, 3])
    own.save(tmp_path / "own.safetensors")
    asked = [str(tmp_path / "own.safetensors"), "--model", str(demo.path("base")), "--concept", "dog"]
    assert main(["report", *asked, "--concept", "cat", "-o", str(page), "--no-figures"]) == 0
    assert [one["name"] for one in json.loads(unpacked(blobs(page)["meta"]))["concepts"]] == ["dog", "cat"]
    capsys.readouterr()
    assert main(["report", str(paths["base", "out"]), "--compare", str(paths["instruct", "in"]), "-o", str(page)]) == 1
    assert "same side" in capsys.readouterr().err


def test_webgl_alone_asks_for_more_rights(maps, tmp_path):
    plain = report.write(maps["base", "in"], tmp_path / "plain.html", figures=[go.Figure(go.Bar(y=[1]))])
    webgl = report.write(maps["base", "in"], tmp_path / "webgl.html", figures=[go.Figure(go.Scattergl(y=[1]))])
    assert "unsafe-eval" not in plain.read_text()[:2000] and "'unsafe-eval'" in webgl.read_text()[:2000]


# Zero directions


def test_a_zero_direction_is_a_row_of_the_page_without_a_reading():
    generator = torch.Generator().manual_seed(0)
    x, W_U = torch.randn(40, 8, generator=generator), torch.randn(8, 30, generator=generator)
    x[[3, 9]] = 0
    neurons = decode_directions(x, W_U, k=3)
    packed = pack.columns(neurons)
    assert (packed["pos.ids"].values[0, 3] == 30).all() and neurons.vocab.names[30] == "<none>"
    for name, column in packed.items():
        assert not np.isnan(column.values).any(), name
    probability = np.exp(packed["scale"].values * packed["pos.top_z"].values - packed["pos.log_z"].values)[0]
    assert probability[3] == probability[9] == 0 and (np.delete(probability, [3, 9]) > 0).all()
    z = packed["pos.z"].values * packed["pos.z"].step
    assert z[0, 3, 0] == 0 and np.allclose(z[0, 4], neurons.positive.z[0, 4].numpy(), atol=1e-3)


def test_a_page_of_a_map_with_zero_directions_is_written(tmp_path):
    x = torch.zeros(40, 8)
    x[:4] = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    W_U = torch.randn(8, 30, generator=torch.Generator().manual_seed(1))
    for directions in (x, torch.zeros(40, 8)):
        neurons = decode_directions(directions, W_U, k=3, tokens=[4])
        page = report.write(neurons, tmp_path / "page.html", figures=None if len(directions.nonzero()) else ())
        assert page.stat().st_size > 10_000


def test_another_maps_tokens_are_shown_by_this_ones_ids(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, W_U = torch.randn(40, 8, generator=generator), torch.randn(8, 30, generator=generator)
    names = [f"w{id}" for id in range(30)]
    a = decode_directions(x, W_U, k=3, tokenizer=names)
    b = decode_directions(x, W_U.flip(1), k=3, tokenizer=[*names[:0:-1], "new"])
    packed = pack.columns(a, compare(a, b))
    theirs = np.vectorize(lambda id: "<none>" if id == 30 else names[id])(packed["other.ids"].values)
    known = b.positive.strings != "new"
    assert (theirs[known] == b.positive.strings[known]).all() and (theirs[~known] == "<none>").all()
    assert (~known).any(), "else this test shows nothing"
