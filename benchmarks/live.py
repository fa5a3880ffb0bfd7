"""The live explorer in a real browser: how long its user waits, from the loaded model on.

    python -m benchmarks.live [FOLDER] [--map MAP ...] [--side SIDE ...] [--rounds 5]

FOLDER is a model's, by default that of SmolLM2-135M-Instruct, which `make models` fetches. Sides without a map are
decoded meanwhile, as `tl-flash explore` does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import real_models
from tests.browser import chromium, seconds_to_answer
from tests.explorers import serving
from tl_flash import NeuronMap, load_model
from tl_flash.explore import apart

PROMPTS = ("What is your favourite animal?", "Tell me about the sea.", "Who lives in a forest?", "How do I bake bread?",
           "Why is the sky blue?", "What should I read?", "Where do birds go in winter?")  # fmt: skip
WORDS = ("dog", "river", "music", "winter", "bread", "doctor", "France")
QUERIES = ("d", "do", "dog", "ri", "river", "L29", "")


def timed(browser: Any, act: str, done: str) -> float:
    """Seconds from an act on the page until something holds there, by the browser's own clock."""
    return browser.execute_async_script(f"""
    const finish = arguments[0], from = performance.now();
    const look = () => (({done}) ? finish((performance.now() - from) / 1000) : setTimeout(look, 4));
    {act};
    look();
    """)


def until(browser: Any, expression: str) -> None:
    wait = 0.01
    while not browser.execute_script(f"return {expression}"):
        time.sleep(wait)
        wait = min(1.1 * wait, 0.2)  # to ask takes time from what is waited for


def told(name: str, seconds: list[float]) -> None:
    print(f"{name:48}{statistics.median(seconds):7.3f} s   (worst of {len(seconds)}: {max(seconds):.3f} s)", flush=True)


def rounds(n: int, act: Callable[[int], float]) -> list[float]:
    return [act(at) for at in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=real_models.SMOLLM2.folder)
    parser.add_argument("--map", type=Path, action="append", default=[])
    parser.add_argument("--side", action="append")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    start = time.perf_counter()
    model, maps = apart(lambda: (load_model(given.folder, surface=None), [*map(NeuronMap.load, given.map)]))
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"model loaded in {time.perf_counter() - start:.1f} s", flush=True)
    with chromium() as browser:
        browser.get("about:blank")
        start = time.perf_counter()
        with serving(model, maps, sides=given.side) as explorer:
            browser.get(f"{explorer.address}/")
            until(browser, "document.body.dataset.open")
            print(f"page open, from the loaded model on: {time.perf_counter() - start:.2f} s", flush=True)
            until(browser, "document.body.dataset.ready")
            print(f"its list, by the map of the first side: {time.perf_counter() - start:.2f} s", flush=True)
            until(browser, "document.body.dataset.decoded")
            print(f"all sides: {time.perf_counter() - start:.2f} s", flush=True)
            measure(browser, given.rounds)


def measure(browser: Any, n: int) -> None:
    first = "document.querySelector('#plain .said-token')"
    steered = "document.querySelector('#steered .said-token')"

    def ask(at: int) -> float:
        seconds = timed(browser, f"$('prompt').value = {PROMPTS[at]!r}; run()", first)
        until(browser, "document.getElementById('stop').hidden")
        return seconds

    def find(at: int) -> float:
        return timed(browser, f"findConcept({WORDS[at]!r})", f"document.body.dataset.found === {WORDS[at]!r}")

    def steer(at: int) -> float:
        dose = 0.5 + at / 4
        seconds = timed(browser, f"tray.clamps.values().next().value.dose = {dose}; tray.changed()", steered)
        until(browser, "document.getElementById('stop').hidden")
        return seconds

    def whole(at: int) -> float:
        act = f"$('n-tokens').value = 24; $('prompt').value = '{at} ' + $('prompt').value; run()"
        return timed(browser, act, f"$('stop').hidden && {steered} && $('steered').innerText.includes('KL')")

    told("first streamed token of an answer", rounds(n, ask))
    told("find a word among all neurons", rounds(n, find))
    told("search as one types", [seconds_to_answer(browser, query) for query in QUERIES])
    best = "document.querySelector('#found') && found.last.hits.find((hit) => hit.side === 'out')"
    browser.execute_script(f"const best = {best}; tray.add(best.neuron, best.sign)")
    until(browser, "tray.clamps.size")
    until(browser, "document.getElementById('stop').hidden")
    told("first streamed token, steered by the slider", rounds(n, steer))
    told("24 tokens of both, with perplexity and KL", rounds(2, whole))


if __name__ == "__main__":
    main()
