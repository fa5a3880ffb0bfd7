"""README's figures and the explorer's screenshots, made of the embedded pair, in light and dark.

    python -m benchmarks.figures [--all FOLDER]

Without `--all`, the few that README shows, into benchmarks/results/figures; with it, one of each kind, into FOLDER.
Validating three sides takes most of the few minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import torch

from benchmarks.lens_effects import RESULTS
from tests.browser import chromium, opened
from tl_flash import activation_stats, clamp_sweep, compare, demo, flash_decode, plots, report, validate
from tl_flash.models import read

THEMES = ("light", "dark")
SIDES = ("out", "in", "gate")
MULTIPLES = (0, 1, 2, 3, 4, 5, 7, 10)
README = ("dose_curve", "validation")


def figures(base, maps, validations, comparison) -> dict[str, Callable[[str], go.Figure]]:
    """One figure of each kind, as functions of the theme."""
    out = maps["out"]
    dog = out.find(" dog", n=1)[0]
    largest = activation_stats(base, demo.NEUTRAL_PROMPTS, layers=[dog.neuron.layer])[dog.neuron].abs_max
    values = [multiple * largest * (1 if dog.pole == "positive" else -1) for multiple in MULTIPLES]
    curve = clamp_sweep(base, dog.neuron, values, demo.NEUTRAL_PROMPTS, [" dog", " cat", " horse"])
    weights = read(base)
    x = torch.cat([weights.directions(layer, "out") for layer in range(weights.n_layers)])
    gain = 1 if weights.final_gain is None else weights.final_gain[:, None]
    W_U = weights.W_U.detach().float() * gain
    hits = out.specialised(600)
    rows = [hit.neuron.layer * out.d_mlp + hit.neuron.index for hit in hits]
    frame = pd.read_csv(RESULTS / "lens_effects_stories260k.csv")
    return {
        "token_by_layer": lambda theme: plots.token_by_layer(out, " dog", theme=theme),
        "neuron": lambda theme: plots.neuron(
            out, dog.neuron, scores=x[dog.neuron.layer * out.d_mlp + dog.neuron.index] @ W_U, theme=theme
        ),
        "specialisation": lambda theme: plots.specialisation(out, theme=theme),
        "agreement": lambda theme: plots.agreement(comparison, theme=theme),
        "changed": lambda theme: plots.changed(comparison, theme=theme),
        "dose_curve": lambda theme: plots.dose_curve(curve, theme=theme),
        "validation": lambda theme: plots.validation(*validations, theme=theme),
        "lens_effects": lambda theme: plots.lens_effects(frame, theme=theme),
        "neuron_atlas": lambda theme: plots.neuron_atlas(x[rows], hits, theme=theme),
    }


def screenshots(page: Path, folder: Path) -> None:
    """The explorer on a desktop, in light and dark with a neuron open, and on a phone."""
    for name, width, height, dark in (
        ("explorer-light", 1280, 800, False),
        ("explorer-dark", 1280, 800, True),
        ("explorer-phone", 390, 780, False),
    ):
        with chromium(width, height, dark) as browser:
            opened(browser, page, "#q=+dog" + ("" if width < 500 else "&neuron=" + _first(browser, page)))
            browser.save_screenshot(str(folder / f"{name}.png"))


def _first(browser, page: Path) -> str:
    opened(browser, page, "#q=+dog")
    return browser.find_element("css selector", ".row .cell.neuron").text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    folder = parser.parse_args().all
    wanted, folder = (README, RESULTS / "figures") if folder is None else (None, folder)
    folder.mkdir(parents=True, exist_ok=True)
    base, instruct = demo.load("base"), demo.load("instruct")
    maps = {side: flash_decode(base, side=side, tokens=[" dog"]) for side in SIDES}
    comparisons = [compare(map, flash_decode(instruct, side=side)) for side, map in maps.items()]
    validations = [validate(base, map, n=30) for map in maps.values()]
    drawn = figures(base, maps, validations, comparisons[SIDES.index("in")])
    chosen = {f"{name}-{theme}": drawn[name](theme) for name in wanted or drawn for theme in THEMES}
    sizes = [figure.layout.height or 540 for figure in chosen.values()]
    pio.write_images(list(chosen.values()), [folder / f"{name}.png" for name in chosen], width=960, height=sizes)
    with tempfile.TemporaryDirectory() as temporary:
        page = report.write(
            list(maps.values()), Path(temporary) / "page.html", compare=comparisons, validation=validations
        )
        screenshots(page, folder)
    for path in sorted(folder.glob("*.png")):
        print(f"{path.name:28}{path.stat().st_size / 1e3:6.0f} kB")


if __name__ == "__main__":
    main()
