"""What makes a real instruct model name the dog as its favourite animal, and does the text still read?

    python -m benchmarks.favourite_animal [MODEL] [--word dog] [--neurons 1,5,12] [--readings in,out,lens] [--share 0.5]

Neurons are the first that `find_neurons` finds by each reading, by weights alone. A clamp's dose is chosen on eight
questions: the smallest at which a share of the answers, by default half, speak of the word. Then ten others are asked,
in the tokenizer's chat template: how many answers speak of it, how much less likely they are to the unclamped model
than its own (perplexity, at most 2 reads), and how repetitive (share of distinct bigrams, at least 0.8 reads). MODEL is
by default SmolLM2-135M-Instruct (`make models`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.lens_texts import lens_of_all_texts
from benchmarks.real_models import SMOLLM2
from tl_flash import activation_stats, demo, dose_window, find_neurons, load_model
from tl_flash.demo.paper import favourite, units

RESULTS = Path(__file__).parent / "results"
KEY = ["reading", "neurons", "clamp", "share"]
"""What a run measures anew in the table that runs before it have written."""
WAYS: dict[str, dict[str, Any]] = {
    "set": {"mode": "set"},
    "set, generated": {"mode": "set", "positions": "generated"},
    "add": {"mode": "add"},
    "floor": {"mode": "floor"},
}


def measure(model: Any, given: argparse.Namespace) -> pd.DataFrame:
    """A row a reading, number of neurons and way of clamping."""
    word, share = given.word, given.share
    lens, stats = lens_of_all_texts(model), activation_stats(model, demo.texts(60))
    rows = []
    for reading in given.readings.split(","):
        hits = find_neurons(model, word, lens=lens, side=reading, n=24)
        for n in map(int, given.neurons.split(",")):
            neurons = units(hits, stats, n)
            for way in given.ways.split(";"):
                how = WAYS[way]
                if way == "floor" and any(unit < 0 for unit in neurons.values()):
                    continue  # a neuron that has to go down has no floor
                row = {"reading": reading, "neurons": len(neurons), "clamp": way, "share": share}
                row |= asked(model, neurons, word, share, how)
                rows.append(row)
                print(row, flush=True)
    return pd.DataFrame(rows)


def asked(model: Any, neurons: dict[Any, float], word: str, share: float, how: dict[str, Any]) -> dict[str, Any]:
    """How often the word is spoken of where it counts, and how the answers read."""
    found = favourite(model, neurons, word, share=share, **how)
    if found.rate is None or found.window.low is None:
        return {"dose": float("nan"), "before": float("nan"), "after": float("nan")}
    dose = found.window.low
    read = dose_window(model, neurons, demo.HELD_OUT_FAVOURITE_ANIMAL, word, chat=True, doses=[dose], **how)
    return {
        "dose": dose,
        "before": found.rate.before,
        "after": found.rate.after,
        "perplexity_ratio": float(read.perplexity_ratio[1]),
        "distinct_ratio": float(read.distinct_ratio[1]),
        "window": found.window.open,
        "answer": found.rate.completions_after[0].strip().replace("\n", " "),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SMOLLM2.folder))
    parser.add_argument("--word", default="dog")
    parser.add_argument("--neurons", default="1,5,12")
    parser.add_argument("--readings", default="in,gate,out,lens")
    parser.add_argument("--ways", default=";".join(WAYS), help="of clamping, with semicolons between them")
    parser.add_argument("--share", type=float, default=0.5, help="of the eight answers that has to speak of the word")
    given = parser.parse_args()
    frame = measure(load_model(given.model), given)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "favourite_animal.csv"
    if path.exists():
        frame = pd.concat([pd.read_csv(path), frame]).drop_duplicates(KEY, keep="last")
    frame.to_csv(path, index=False, float_format="%.3f")
    print(frame.drop(columns="answer").to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
