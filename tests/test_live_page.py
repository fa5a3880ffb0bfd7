"""The live explorer, as a browser shows it and drives it."""

import time
from contextlib import contextmanager

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests import families
from tests.browser import chromium, needs_browser
from tests.explorers import serving
from tests.test_report import HOSTILE, errors, in_page, press, requests, shown, type_in
from tl_flash import demo, flash_decode

pytestmark = needs_browser
QUESTION = "What is your favourite animal?"
DOG = "L0N364"


@pytest.fixture(scope="module")
def model():
    model = demo.load("instruct")
    model.tokenizer.chat_template = demo.CHAT_TEMPLATE
    return model


@pytest.fixture(scope="module")
def explorer(model):
    maps = [flash_decode(model, side=side) for side in ("out", "in")]
    with serving(model, maps, texts=demo.texts(60)) as explorer:
        yield explorer


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def driver(browser):
    """With nothing left of the test before: its page may have asked on after its server stopped."""
    browser.get("about:blank")
    errors(browser), requests(browser)
    return browser


def until(driver, expression, seconds=30):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, 0.02).until(lambda d: in_page(d, expression))


def opened(driver, explorer, view="", *, fresh=True):
    driver.get("about:blank")
    driver.get(f"{explorer.address}/")
    if fresh:
        driver.execute_script("localStorage.clear()")
    driver.get("about:blank")
    errors(driver), requests(driver)
    driver.get(f"{explorer.address}/{view}")
    until(driver, "document.body.dataset.ready")
    return driver


def click(driver, selector):
    driver.find_element("css selector", selector).click()


def said(driver, stream):
    return driver.find_element("css selector", f"#{stream} .said").text


def written(driver, number, seconds=60):
    until(driver, f"document.body.dataset.written === '{number}'", seconds)


def only_its_own(driver, explorer):
    """Nothing went wrong, and nobody else was asked."""
    assert errors(driver) == []
    assert [url for url in requests(driver) if not url.startswith(explorer.address)] == []


def test_three_clicks_end_in_another_answer(driver, explorer):
    opened(driver, explorer)
    assert "1 Ask" in driver.find_element("id", "path").text
    click(driver, "[data-step='1']")
    written(driver, 1)
    before = said(driver, "plain")
    assert before.startswith("My favourite") and "dog" not in before
    click(driver, "[data-step='2']")
    until(driver, "document.body.dataset.found === 'dog'")
    click(driver, "[data-step='3']")
    written(driver, 2)
    assert said(driver, "plain") == before
    assert "dog" in said(driver, "steered") and said(driver, "steered") != before
    assert "perplexity" in driver.find_element("css selector", "#plain .measures").text
    assert "KL" in driver.find_element("css selector", "#steered .measures").text
    assert "address keeps it all" in driver.find_element("id", "path").text
    click(driver, "#path .close")
    opened(driver, explorer, fresh=False)
    assert not driver.find_element("id", "path").is_displayed(), "who has seen it is not told again"
    only_its_own(driver, explorer)


def test_the_neuron_found_by_typing_is_steered_from_its_panel(driver, explorer):
    opened(driver, explorer)
    driver.find_element("id", "prompt").send_keys(QUESTION)
    press(driver, "\ue007")
    written(driver, 1)
    type_in(driver, "dog")
    assert DOG in shown(driver)[:6]
    press(driver, "\ue007")
    until(driver, "document.body.dataset.found === 'dog'")
    rows = driver.find_elements("css selector", "#found tbody tr")
    (row,) = [row for row in rows if DOG in row.text and "W_out" in row.text]
    q_value = float(row.find_elements("tag name", "td")[5].text)
    assert 0 < q_value < 1e-4
    row.find_element("css selector", ".name").click()
    assert driver.find_element("css selector", "#panel h2").text == DOG
    click(driver, "#steer")
    written(driver, 2)
    assert "dog" in said(driver, "steered") and "dog" not in said(driver, "plain")
    slider = driver.find_element("css selector", "#tray input[type=range]")
    dose = slider.get_attribute("value")
    driver.execute_script("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input')); "
                          "arguments[0].dispatchEvent(new Event('change'))", slider)  # fmt: skip
    written(driver, 3)
    assert "dog" not in said(driver, "steered") and f"{DOG}%3A0" in driver.current_url and float(dose) > 0
    only_its_own(driver, explorer)


def test_a_chip_that_is_switched_off_is_not_looked_for(driver, explorer):
    opened(driver, explorer)
    type_in(driver, "dog")
    press(driver, "\ue007")
    until(driver, "document.querySelectorAll('#found .chip').length === 2")
    best = driver.find_element("css selector", "#found tbody .name").text
    click(driver, "#found .chip:last-child")
    until(driver, "found.last.tokens.length === 1")
    assert driver.find_element("css selector", "#found tbody .name").text != best
    pressed = [chip.get_attribute("aria-pressed") for chip in driver.find_elements("css selector", "#found .chip")]
    assert pressed == ["true", "false"]
    only_its_own(driver, explorer)


def test_a_token_shows_what_was_likelier(driver, explorer):
    opened(driver, explorer, "#ask=One+day%2C&n=6")
    written(driver, 1)
    for stream in ("plain", "read"):
        nodes = driver.find_elements("css selector", f"#{stream} .said-token")
        nodes[2].click()
        listed = driver.find_elements("css selector", "#alternatives li")
        assert len(listed) == 8 and all("%" in line.text for line in listed)
        if stream == "plain":
            assert listed[0].get_attribute("class") == "own", "greedy: it is the likeliest"
    press(driver, "\ue00c")
    assert not driver.find_element("id", "alternatives").is_displayed()
    assert driver.find_elements("css selector", "#next li")
    only_its_own(driver, explorer)


def test_a_token_is_explained_by_its_neurons(driver, explorer):
    opened(driver, explorer, "#ask=One+day%2C&n=6")
    written(driver, 1)
    token = driver.find_elements("css selector", "#plain .said-token")[2]
    token.click()
    click(driver, "#explain")
    until(driver, "document.querySelectorAll('#explained tbody tr').length")
    assert token.text.strip() in driver.find_element("css selector", "#explained h2").text
    chips = driver.find_elements("css selector", "#explained .prompt-tokens .chip")
    assert len(chips) == len(driver.find_elements("css selector", "#read .said-token")) + 2
    name = driver.find_element("css selector", "#explained tbody button").text
    click(driver, "#explained tbody button")
    until(driver, f"document.querySelector('#panel h2')?.textContent.includes('{name}')")
    only_its_own(driver, explorer)


def test_a_link_holds_the_whole_state(driver, explorer):
    opened(driver, explorer)
    driver.find_element("id", "prompt").send_keys(QUESTION)
    driver.execute_script("tray.mode = 'add'; tray.positions = 'last'; tray.add(arguments[0], 1, ' dog')", DOG)
    written(driver, 1)
    driver.execute_script("openNamed(arguments[0])", DOG)
    state = (
        "[location.href, document.getElementById('tray').textContent, document.querySelector('#panel h2').textContent]"
    )
    kept = in_page(driver, state)
    answers = said(driver, "plain"), said(driver, "steered")
    assert all(answers)
    driver.get("about:blank")
    driver.get(kept[0])
    written(driver, 1)
    until(driver, "document.body.dataset.ready")
    until(driver, "tray.units.size")
    assert (said(driver, "plain"), said(driver, "steered")) == answers
    address, tray, panel = in_page(driver, state)
    assert (address, panel) == (kept[0], kept[2]) and tray.replace("·dog", "") == kept[1].replace("·dog", "")
    only_its_own(driver, explorer)


@contextmanager
def slow(model, seconds):
    model.blocks[0].hook_resid_pre.add_perma_hook(lambda act, hook: time.sleep(seconds))
    try:
        yield
    finally:
        model.reset_hooks(including_permanent=True)


def test_a_job_is_cancelled_and_what_came_stays(driver, explorer, model):
    opened(driver, explorer)
    with slow(model, 0.1):
        driver.execute_script("document.getElementById('n-tokens').value = 128")
        driver.find_element("id", "prompt").send_keys("The story begins")
        click(driver, "#run")
        until(driver, "document.querySelectorAll('#plain .said-token').length > 2")
        click(driver, "#stop")
        until(driver, "document.getElementById('work').textContent === 'stopped'")
    assert len(driver.find_elements("css selector", "#plain .said-token")) < 100
    assert not driver.find_element("id", "stop").is_displayed() and said(driver, "plain")
    only_its_own(driver, explorer)


def test_tests_of_a_neuron_with_progress_and_cancel(driver, explorer, model):
    opened(driver, explorer, f"#side=out&neuron={DOG}")
    with slow(model, 0.1):
        click(driver, "#validate")
        until(driver, "/passes/.test(document.getElementById('testing').textContent)")
        click(driver, "#cancel-test")
        until(driver, "document.getElementById('testing').textContent === 'cancelled'")
    click(driver, "#validate")
    until(driver, "document.getElementById('validated')")
    assert "beyond its controls" in driver.find_element("id", "validated").text
    click(driver, "#dose")
    until(driver, "document.querySelector('#dose-curve path.curve')")
    click(driver, "#window")
    until(driver, "document.getElementById('dose-window')", 90)
    assert "text reads" in driver.find_element("id", "dose-window").text
    driver.find_element("id", "pasted").send_keys("The dog saw a cat. <b>bold</b>")
    click(driver, "#shade")
    until(driver, "document.querySelector('.shade')")
    shades = driver.find_elements("css selector", ".shade")
    assert "dog" in "".join(shade.text for shade in shades) and not driver.find_elements("css selector", ".shaded b")
    only_its_own(driver, explorer)


def test_two_tabs_work_at_once(driver, explorer, model):
    opened(driver, explorer)
    first = driver.current_window_handle
    with slow(model, 0.03):
        driver.find_element("id", "prompt").send_keys("One day,")
        click(driver, "#run")
        driver.switch_to.new_window("tab")
        driver.get(f"{explorer.address}/#ask=It+was+about&n=12")
        until(driver, "document.body.dataset.open")
        written(driver, 1, 90)
        second = said(driver, "plain")
    driver.close()
    driver.switch_to.window(first)
    written(driver, 1, 90)
    assert second and said(driver, "plain") and second != said(driver, "plain")
    only_its_own(driver, explorer)


def test_a_lost_connection_loses_nothing(driver, explorer, model):
    opened(driver, explorer)
    with slow(model, 0.1):
        driver.find_element("id", "prompt").send_keys("They talked about")
        click(driver, "#run")
        until(driver, "document.querySelectorAll('#plain .said-token').length > 1")
        driver.execute_script(
            "window.lost = 0; const see = () => { if (/lost/.test($('work').textContent)) lost++; };"
            "new MutationObserver(see).observe($('work'), { childList: true })"
        )
        explorer.cut()
        written(driver, 1, 90)
    assert in_page(driver, "lost"), "the connection was lost meanwhile"
    whole = in_page(driver, "[...document.querySelectorAll('#plain .said-token')].map((node) => node.textContent)")
    driver.execute_script("run()")
    written(driver, 2)
    again = in_page(driver, "[...document.querySelectorAll('#plain .said-token')].map((node) => node.textContent)")
    assert whole == again
    errors(driver)  # the browser tells of the broken connection


def test_keys(driver, explorer):
    opened(driver, explorer)
    press(driver, "a")
    assert in_page(driver, "document.activeElement.id") == "prompt"
    press(driver, "t", "/", "?")
    assert in_page(driver, "document.getElementById('prompt').value") == "t/?", "typing is no command"
    press(driver, "\ue00c")
    driver.execute_script("document.activeElement.blur()")
    press(driver, "/")
    assert in_page(driver, "document.activeElement.id") == "query"
    press(driver, "L0N364", "\ue007")
    assert driver.find_element("css selector", "#panel h2").text == DOG
    press(driver, "\ue00c")
    assert not driver.find_element("id", "panel").is_displayed()
    only_its_own(driver, explorer)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1440, True)])
def test_narrow_and_dark(explorer, width, dark):
    with chromium(width, 800, dark) as driver:
        opened(driver, explorer, f"#ask=One+day%2C&n=6&clamp={DOG}:1")
        written(driver, 1)
        assert in_page(driver, "document.documentElement.scrollWidth") <= width
        red, *_ = map(int, in_page(driver, "getComputedStyle(document.body).backgroundColor")[4:-1].split(","))
        assert (red < 60) == dark
        if width < 900:
            assert not driver.find_element("id", "query").is_displayed()
            click(driver, "#switch-half")
            assert driver.find_element("id", "query").is_displayed()
            type_in(driver, "dog")
            press(driver, "\ue007")
            until(driver, "document.body.dataset.found === 'dog'")
            click(driver, "#found .steer")
            written(driver, 2)
            assert driver.find_element("id", "steered").is_displayed(), "what it did is seen"
        assert in_page(driver, "document.documentElement.scrollWidth") <= width
        only_its_own(driver, explorer)


def hostile_tokenizer(n):
    strings = dict.fromkeys([*HOSTILE, *(f"<img src=x onerror=window.ran={i}>" for i in range(n))])
    vocab = {string: id for id, string in enumerate(list(strings)[:n])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token=HOSTILE[0])), unk_token=HOSTILE[0], bos_token=HOSTILE[1],
        eos_token=HOSTILE[4],
    )  # fmt: skip
    tokenizer.init_kwargs.update(name_or_path="hostile", add_bos_token=True)
    return tokenizer


def test_hostile_vocabulary_and_prompts_run_nothing(driver):
    model = families.build("llama", "bridge" if families.HAS_BRIDGE else "hooked-raw")
    prompt = "<script>window.ran=1</script><img src=x onerror=window.ran=2>\u202egod"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "tokenizer", hostile_tokenizer(60))
        with serving(model, texts=["a b c", "<script>alert(1)</script>"]) as explorer:
            opened(driver, explorer)
            until(driver, "document.body.dataset.decoded")
            driver.find_element("id", "prompt").send_keys(prompt)
            driver.execute_script("tray.add('L1N3', 1, '<img src=x onerror=window.ran=3>')")
            written(driver, 1)
            driver.find_element("css selector", "#plain .said-token").click()
            driver.execute_script("findConcept(arguments[0])", "<img src=x onerror=window.ran=4>")
            until(driver, "document.querySelector('#found .complaint, #found table')")
            driver.execute_script("found.close(); openNeuron(0)")
            driver.find_element("id", "pasted").send_keys(prompt)
            click(driver, "#shade")
            until(driver, "document.querySelector('.shade, .shaded .special, .shaded .complaint')")
            driver.get(
                f"{explorer.address}/#ask=%3Cimg+src%3Dx+onerror%3Dwindow.ran%3D5%3E&clamp=%3Cscript%3E:1,L1N3:1&mode=__proto__"
            )
            driver.refresh()
            written(driver, 1)
            assert in_page(driver, "window.ran") is None
            assert in_page(driver, "document.querySelectorAll('img, iframe, object, embed, a[href]').length") == 0
            assert in_page(driver, "document.querySelectorAll('script').length") == 1
            only_its_own(driver, explorer)


def test_it_asks_before_any_map_is_there(driver, model):
    with serving(model, texts=demo.texts(8), prepare=False) as explorer:
        driver.get("about:blank")
        driver.get(f"{explorer.address}/#ask=One+day%2C&n=5&q=dog&neuron={DOG}")
        written(driver, 1)
        assert said(driver, "plain") and in_page(driver, "document.body.dataset.ready") is None
        assert "q=dog" in driver.current_url, "what the link asks for is kept until its map is there"
        driver.find_element("id", "query").send_keys("dog\ue007")
        until(driver, "document.body.dataset.found === 'dog'")
        explorer.session.prepare()
        driver.get("about:blank")
        driver.get(f"{explorer.address}/#side=in&neuron={DOG}")
        until(driver, "document.body.dataset.decoded")
        until(driver, "page.search.side.side === 'in'")
        assert driver.find_element("css selector", "#panel h2").text == DOG
        only_its_own(driver, explorer)
