"""README's figures and the explorer's screenshots, made of the embedded pair unless they say otherwise, light and dark.

    python -m benchmarks.figures [--all FOLDER]

Without `--all`, the few that README shows, into benchmarks/results/figures; with it, one of each kind, into FOLDER.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import torch
from torch import Tensor

from benchmarks.live import until
from tests.browser import chromium, opened
from tests.explorers import serving
from tl_flash import (
    Comparison,
    NeuronMap,
    Validation,
    activation_stats,
    clamp_sweep,
    compare,
    demo,
    flash_decode,
    plots,
    report,
    validate,
)
from tl_flash.demo.tour import doses
from tl_flash.weights import read

RESULTS = Path(__file__).parent / "results"
FOLDER = RESULTS / "figures"
THEMES = ("light", "dark")
SIDES = ("out", "in", "gate")
README = ("dose_curve", "validation", "lens_effects")
SHOTS = (("light", 1280, 800, False), ("dark", 1280, 800, True), ("phone", 390, 780, False))


def figures(
    base: Any, maps: dict[str, NeuronMap], validations: list[Validation], comparison: Comparison
) -> dict[str, Callable[..., go.Figure]]:
    """One figure of each kind, to be drawn in a theme."""
    out = maps["out"]
    dog, hits = out.find(" dog", n=1)[0], out.specialised(600)
    curve = clamp_sweep(base, dog.neuron, doses(base, dog), demo.NEUTRAL_PROMPTS, [" dog", " cat", " horse"])
    x, W_U = write_directions(base)
    rows = [hit.neuron.layer * out.d_mlp + hit.neuron.index for hit in [dog, *hits]]

    lens = pd.read_csv(RESULTS / "lens_effects_smollm2.csv")  # of `python -m benchmarks.lens_effects smollm2`

    return {
        "token_by_layer": functools.partial(plots.token_by_layer, out, " dog"),
        "neuron": functools.partial(plots.neuron, out, dog.neuron, scores=x[rows[0]] @ W_U),
        "specialisation": functools.partial(plots.specialisation, out),
        "agreement": functools.partial(plots.agreement, comparison),
        "changed": functools.partial(plots.changed, comparison),
        "dose_curve": functools.partial(plots.dose_curve, curve),
        "validation": functools.partial(plots.validation, *validations),
        "lens_effects": functools.partial(plots.lens_effects, lens),
        "neuron_atlas": functools.partial(plots.neuron_atlas, x[rows[1:]], hits),
    }


def write_directions(model: Any) -> tuple[Tensor, Tensor]:
    """All write directions [neuron, d_model], layer by layer, and the folded unembedding."""
    weights = read(model)
    gain = torch.ones(len(weights.W_U)) if weights.final_gain is None else weights.final_gain
    x = torch.cat([weights.directions(layer, "out") for layer in range(weights.n_layers)])
    return x, weights.W_U.detach().float() * gain[:, None]


def screenshots(page: Path, neuron: str, folder: Path) -> None:
    """The explorer on a desktop with a neuron open, in light and dark, and on a phone."""
    for name, width, height, dark in SHOTS:
        with chromium(width, height, dark) as browser:
            opened(browser, page, "#q=+dog" + ("" if name == "phone" else f"&neuron={neuron}"))
            browser.save_screenshot(str(folder / f"explorer-{name}.png"))


def live_screenshots(folder: Path) -> None:
    """The live explorer of the instruct model with its dog neuron clamped, as the addresses of `SHOTS` show it."""
    model: Any = demo.load("instruct")
    model.tokenizer.chat_template = demo.CHAT_TEMPLATE
    with serving(model, [flash_decode(model, side=side) for side in SIDES], texts=demo.texts(60)) as explorer:
        hits = explorer.told("find", "found", concept="dog")["hits"]
        best = min((hit for hit in hits if hit["side"] == "out"), key=lambda hit: hit["q_value"])["neuron"]
        dose = max(0.25, explorer.told("unit", "unit", neuron=best)["first"])
        asked = {"ask": "What is your favourite animal?", "chat": 1, "n": 40, "clamp": f"{best}:{dose:.2f}", "q": "dog"}
        for name, width, height, dark in SHOTS:
            with chromium(width, height, dark) as browser:
                browser.get(f"{explorer.address}/#{urlencode(asked)}")
                until(browser, "document.body.dataset.written && document.body.dataset.ready && tray.units.size")
                browser.execute_script("closePath(); if (!isNarrow()) findConcept('dog')")
                until(browser, "isNarrow() || document.body.dataset.found")
                browser.save_screenshot(str(folder / f"live-{name}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    given = parser.parse_args().all
    folder = given or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    base, instruct = demo.load("base"), demo.load("instruct")
    maps = {side: flash_decode(base, side=side, tokens=[" dog"]) for side in SIDES}
    comparisons = {side: compare(map, flash_decode(instruct, side=side)) for side, map in maps.items()}
    stats = activation_stats(base, demo.texts(200))
    validations = [
        validate(base, map, n=50, prompts=demo.NEUTRAL_PROMPTS, stats=stats, controls=10) for map in maps.values()
    ]
    kinds = figures(base, maps, validations, comparisons["in"])
    drawn = {f"{kind}-{theme}": kinds[kind](theme=theme) for kind in (kinds if given else README) for theme in THEMES}
    heights = [figure.layout.height or 540 for figure in drawn.values()]
    pio.write_images(list(drawn.values()), [folder / f"{name}.png" for name in drawn], width=960, height=heights)
    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary) / "page.html"
        report.write(list(maps.values()), page, compare=list(comparisons.values()), validation=validations)
        screenshots(page, str(maps["out"].find(" dog", n=1)[0].neuron), folder)
    live_screenshots(folder)
    for path in sorted(folder.glob("*.png")):
        print(f"{path.name:28}{path.stat().st_size / 1e3:6.0f} kB")


if __name__ == "__main__":
    main()
