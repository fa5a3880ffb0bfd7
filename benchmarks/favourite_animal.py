"""What makes a real instruct model name the dog as its favourite animal, and does the text still read?

    python -m benchmarks.favourite_animal [MODEL] [--word dog] [--neurons 1 5 12] [--readings "in;lens"] [--ways ...]

Neurons are the first that `find_neurons` finds by each reading, by weights alone: "lens" is the mean-field one of all
texts that the package brings, "default lens" the one that `jacobian_lens` makes by itself. A clamp's doses are chosen
on 26 questions: the smallest at which half of the answers speak of the word, and the largest up to which they read. At
both ten others are asked, in the tokenizer's chat template: how many answers speak of it, how much less likely they are
to the unclamped model than its own (perplexity, at most 2 reads), and how repetitive (share of distinct bigrams, at
least 0.8 reads). MODEL is by default SmolLM2-135M-Instruct (`make models`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.lens_texts import lens_of_all_texts
from benchmarks.measure import asked_names
from benchmarks.real_models import SMOLLM2
from benchmarks.tables import kept
from tl_flash import activation_stats, demo, dose_window, find_neurons, jacobian_lens, load_model
from tl_flash.demo.paper import ASKED, units
from tl_flash.weights import read

RESULTS = Path(__file__).parent / "results"
KEY = ["model", "word", "reading", "neurons", "clamp", "dose_where"]
"""What a run measures anew in the table that runs before it have written."""
MOST = 24
"""Neurons at most."""
READINGS = ("in", "gate", "out", "lens", "default lens")
WAYS: dict[str, dict[str, Any]] = {
    "set": {"mode": "set"},
    "set, generated": {"mode": "set", "positions": "generated"},
    "set, last": {"mode": "set", "positions": "last"},
    "add": {"mode": "add"},
    "floor": {"mode": "floor"},
}


def measure(
    model: Any, word: str, readings: Sequence[str], counts: Sequence[int], ways: Sequence[str]
) -> Iterator[pd.DataFrame]:
    """For every reading, number of neurons and way of clamping a row for each end of the dose window."""
    stats = activation_stats(model, demo.texts(60))
    makers = {"lens": lens_of_all_texts, "default lens": jacobian_lens}
    for reading in readings:
        if reading in makers:
            hits = find_neurons(model, word, lens=makers[reading](model), side="lens", n=2 * MOST)
        else:
            hits = find_neurons(model, word, side=reading, n=2 * MOST)
        for n in counts:
            neurons = units(hits, stats, n)
            which = " ".join(f"{'-' if unit < 0 else ''}{neuron}" for neuron, unit in neurons.items())
            for way in ways:
                if way == "floor" and any(unit < 0 for unit in neurons.values()):
                    continue  # a neuron that has to go down has no floor
                rows = asked(model, neurons, word, WAYS[way])
                print(reading, n, way, *rows, sep="\n  ", flush=True)
                of = {"model": Path(read(model).name).name, "word": word, "reading": reading, "neurons": len(neurons)}
                yield pd.DataFrame(rows).assign(**of, clamp=way, which=which)


def asked(model: Any, neurons: dict[Any, float], word: str, how: dict[str, Any]) -> list[dict[str, Any]]:
    """How often the word is spoken of where it counts, and how the answers read, at both ends of the window."""
    window = dose_window(model, neurons, ASKED, word, chat=True, **how)
    ends = {"it shows": window.low, "it reads": window.high}
    doses = sorted({dose for dose in ends.values() if dose is not None})
    if not doses:
        return [{"dose_where": end, "open": False} for end in ends]
    held_out = dose_window(model, neurons, demo.HELD_OUT_FAVOURITE_ANIMAL, word, chat=True, doses=doses, **how)
    rows = []
    for end, dose in ends.items():
        row: dict[str, Any] = {"dose_where": end, "open": window.open}
        if dose is not None:
            at = 1 + doses.index(dose)
            row |= {"dose": dose, "before": float(held_out.share_shown[0]), "after": float(held_out.share_shown[at])}
            row |= {"perplexity_ratio": float(held_out.perplexity_ratio[at])}
            row |= {"distinct_ratio": float(held_out.distinct_ratio[at])}
            row |= {"answer": held_out.completions[at][0].strip().replace("\n", " ")}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SMOLLM2.folder))
    parser.add_argument("--word", default="dog")
    parser.add_argument("--neurons", type=int, nargs="+", default=[1, 5, 12])
    parser.add_argument("--readings", default=";".join(READINGS), help="with semicolons between them")
    parser.add_argument("--ways", default=";".join(WAYS), help="of clamping, with semicolons between them")
    given = parser.parse_args()
    readings = asked_names(parser, "--readings", given.readings, READINGS)
    ways = asked_names(parser, "--ways", given.ways, WAYS)
    if not all(1 <= n <= MOST for n in given.neurons):
        parser.error(f"--neurons: expected from 1 to {MOST}, got {given.neurons}")
    for rows in measure(load_model(given.model), given.word, readings, given.neurons, ways):
        kept(RESULTS / "favourite_animal.csv", rows, KEY)


if __name__ == "__main__":
    main()
