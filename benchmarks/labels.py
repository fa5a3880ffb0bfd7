"""Do labels hold? The most specialised neurons and random ones, each clamped within its own range.

    python -m benchmarks.labels [smollm2 | gemma3 | demo] [--specialised 100] [--random 200] [--readings "out;lens"]

For every reading (W_in, W_gate, W_out, W_out through the mean-field lens) neurons are clamped to their own
max|hook_post| over texts, with the sign that should raise their label, the top token of their better pole. What counts
is the share whose label is raised beyond matched controls (q <= 0.05), by third of the depth. Of a reading that is not
asked for, the table keeps what an earlier run wrote.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.lens_texts import lens_of_all_texts
from benchmarks.measure import asked_names
from benchmarks.real_models import GEMMA3, SMOLLM2
from benchmarks.tables import kept
from tl_flash import NeuronMap, activation_stats, demo, load_model, validate
from tl_flash.clamps import NEUTRAL_PROMPTS
from tl_flash.demo.paper import readings
from tl_flash.maps import Hits

RESULTS = Path(__file__).parent / "results"
READINGS = ("in", "gate", "out", "lens")
THIRDS = ("first", "middle", "last")


def chosen(neurons: NeuronMap, specialised: int, others: int) -> dict[str, Hits]:
    """The most specialised, and others at random, each by its better pole."""
    every = neurons.specialised(len(neurons), quantile=0.0)  # all but those under the least of the null
    rest = random.Random(0).sample(range(specialised, len(every)), others)
    some = replace(
        every,
        hits=tuple(every.hits[at] for at in rest),
        token_ids=tuple(every.token_ids[at] for at in rest),
        ids=every.ids[rest],
    )
    return {"specialised": neurons.specialised(specialised), "random": some}


def measure(
    model: Any, asked: Sequence[str], *, specialised: int, others: int, prompts: int, controls: int
) -> pd.DataFrame:
    """A row a neuron tested, of the readings asked for."""
    lens, stats = lens_of_all_texts(model), activation_stats(model, demo.texts(60))
    frames = []
    for reading, neurons in readings(model, lens).items():
        if reading not in asked:
            continue
        for kind, hits in chosen(neurons, specialised, others).items():
            tested = validate(
                model,
                hits,
                prompts=NEUTRAL_PROMPTS[:prompts],
                controls=controls,
                dose=1.0,
                stats=stats,
                lens=lens if reading == "lens" else None,
            )
            print(f"{reading}, {kind}: {tested!r}", flush=True)
            layers = tested.to_frame()["neuron"].str.extract(r"L(\d+)")[0].astype(int)
            third = [THIRDS[3 * layer // neurons.n_layers] for layer in layers]
            frames.append(tested.to_frame().assign(reading=reading, kind=kind, third=third))
    return pd.concat(frames, ignore_index=True)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """By reading and kind: how many, the share raised beyond controls, in all and by third, and the median change."""
    rows = []
    for name, part in frame.assign(name=frame["reading"] + ", " + frame["kind"]).groupby("name", sort=False):
        beyond = (part["q_value"] <= 0.05) & (part["dlogp"] > 0)
        row: dict[str, Any] = {"reading, neurons": name, "tested": len(part)}
        row |= {"raised": (part["dlogp"] > 0).mean(), "beyond controls": beyond.mean()}
        for third in THIRDS:
            of = part["third"] == third
            row[third] = f"{int(beyond[of].sum())} of {int(of.sum())}"
        row |= {"median change": pd.Series(part["dlogp"]).median()}
        row |= {"of controls": pd.Series(part["control_dlogp"]).median()}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = {"smollm2": SMOLLM2.folder, "gemma3": GEMMA3.folder, "demo": demo.path("base")}
    parser.add_argument("model", nargs="?", choices=folders, default="smollm2")
    parser.add_argument("--specialised", type=int, default=100, help="neurons of a reading")
    parser.add_argument("--random", type=int, default=200, help="neurons of a reading")
    parser.add_argument("--readings", default=";".join(READINGS), help="with semicolons between them")
    parser.add_argument("--prompts", type=int, default=6, help="neutral ones")
    parser.add_argument("--controls", type=int, default=8, help="a neuron")
    given = parser.parse_args()
    sizes = {"prompts": given.prompts, "controls": given.controls}
    asked = asked_names(parser, "--readings", given.readings, READINGS)
    model = load_model(folders[given.model])
    frame = measure(model, asked, specialised=given.specialised, others=given.random, **sizes)
    table = kept(RESULTS / f"labels_{given.model}.csv", summary(frame).assign(**sizes), ["reading, neurons"])
    print(table.to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
