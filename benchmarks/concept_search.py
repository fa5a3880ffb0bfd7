"""Do the neurons that a search finds for a concept raise it, and do like neurons not?

    python -m benchmarks.concept_search [smollm2 | gemma3 | demo] [--nouns 30] [--hits 10] [--ways "find_neurons, lens"]

For each noun the first hits of `find_neurons` on each side and through the mean-field lens, of its coherent ones, and
of `NeuronMap.find` on the single token (" dog") are clamped, each alone, to its own max|hook_post| over texts, with the
sign of the hit. What counts is the change of the log-probability of the concept (the sum over the whole words of its
set) as the next token, in the mean over neutral prompts. A hit raises its concept where this is above 0 and beyond its
controls: neurons of the same layer of about the same ||W_out||, clamped to the same value; one-sided, 5%, by a Student
prediction interval. Of ways to search that are not asked for, the table keeps what an earlier run wrote. With `--time`,
how long a table of 100 concepts takes, read from the checkpoint, and who is first for "dog".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.lens_texts import lens_of_all_texts
from benchmarks.measure import asked_names
from benchmarks.real_models import GEMMA3, SMOLLM2
from benchmarks.tables import kept
from tl_flash import Neuron, NeuronMap, activation_stats, concepts, demo, flash_decode, load_model
from tl_flash.clamps import NEUTRAL_PROMPTS, Answers, Prompts, answers_alone
from tl_flash.evidence import Peers, chance_of
from tl_flash.maps import ConceptTable, Hit
from tl_flash.progress import track
from tl_flash.weights import read

NOUNS = (
    "dog cat horse bird fish tree flower bread milk apple water river house door car train book music doctor king "
    "money war winter sun rain gold blood California London Paris"
).split()
MORE = "ship stone paper glass bread chair table window garden field".split()
RESULTS = Path(__file__).parent / "results"
WAYS = (
    *(f"find_neurons, {side}" for side in ("in", "gate", "out", "lens", "coherent")),
    *(f"find, {side}" for side in ("in", "out")),
)
Found = tuple[str, int, Neuron, int]
"""Way of searching, rank, neuron, sign."""


def searched(table: ConceptTable, maps: dict[str, NeuronMap], word: str, n: int) -> Iterator[Found]:
    """The hits of every way to search for a word."""
    ways = {f"find_neurons, {side}": table.hits(word, n, side=side) for side in table.sides}
    ways["find_neurons, coherent"] = table.hits(word, n, by="coherence")
    for way, hits in ways.items():
        for rank, hit in enumerate(hits):
            yield way, rank, Neuron.of(hit.neuron), hit.sign
    for side, neurons in maps.items():
        if f" {word}" not in neurons.vocab.names:
            continue
        for rank, hit in enumerate(neurons.find(f" {word}", n=n)):
            yield f"find, {side}", rank, Neuron.of(hit.neuron), _sign(hit, side)


def _sign(hit: Hit, side: str) -> int:
    up = hit.pole == "positive" if side == "out" else hit.write_z > 0
    return 1 if up else -1


def measure(
    model: Any,
    checkpoint: Any,
    words: Sequence[str],
    texts: list[str],
    *,
    ways: Sequence[str],
    hits: int,
    prompts: int,
    controls: int,
) -> pd.DataFrame:
    """A row a concept, way of searching and rank, of the ways asked for."""
    table = concepts(model, words, lens=lens_of_all_texts(model))
    maps = {side: flash_decode(checkpoint, side=side) for side in ("in", "out")}
    stats, peers = activation_stats(model, texts), Peers(read(model), controls, seed=0)
    asked = Prompts.of(model, NEUTRAL_PROMPTS[:prompts])
    before = Answers.of(model, asked).log_probs
    records = []
    for word in track(words, "clamping", True):
        at = table.number(word)
        weights = table.null.weights[at]
        tokens = [id for id, weight in zip(table.ids[at], weights, strict=True) if weight == weights.max()]
        done: dict[tuple[Neuron, int], dict[str, Any]] = {}
        for way, rank, neuron, sign in searched(table, maps, word, hits):
            if way not in ways:
                continue
            value = sign * stats.abs_max_of(neuron)
            if (neuron, sign) not in done:
                clamps = [(one, value) for one in (neuron, *peers.of(neuron))]
                changes = [
                    float((after.log_probs[:, tokens].logsumexp(1) - before[:, tokens].logsumexp(1)).mean())
                    for after in answers_alone(model, asked, clamps)
                ]
                own, others = changes[0], torch.tensor(changes[1:])
                p = chance_of(own, others)
                control = float(others.mean())
                done[neuron, sign] = dict(neuron=str(neuron), value=value, dlogp=own, control_dlogp=control, p_value=p)
            records.append({"concept": word, "way": way, "rank": rank, **done[neuron, sign]})
    frame = pd.DataFrame(records)
    return frame.assign(raised=(frame["dlogp"] > 0) & (frame["p_value"] <= 0.05))


def summary(frame: pd.DataFrame, words: Sequence[str], hits: int) -> pd.DataFrame:
    """Precision at 1, 5 and 10: of so many hits for each concept the share that raises it; a missing one does not."""
    rows = []
    for way, part in frame.groupby("way", sort=False):
        row: dict[str, Any] = {"way": way, "concepts with a hit": part["concept"].nunique()}
        for k in (k for k in (1, 5, 10) if k <= hits):
            row[f"precision at {k}"] = part[part["rank"] < k]["raised"].sum() / (k * len(words))
        first = part[part["rank"] == 0]
        for name, column in (("median change of the first", "dlogp"), ("of controls", "control_dlogp")):
            row[name] = pd.Series(first[column]).median()
        rows.append(row)
    return pd.DataFrame(rows)


def timed(checkpoint: Any) -> str:
    """Of a table of a hundred concepts, all neurons and sides."""
    words = list(dict.fromkeys([*NOUNS, *(concept.word for concept in demo.CONCEPTS), *MORE]))[:100]
    start = time.perf_counter()
    table = concepts(checkpoint, words)
    seconds = time.perf_counter() - start
    rows = len(table.sides) * table.z.shape[2]
    return f"{len(words)} concepts by {rows:,} directions: {seconds:.1f} s\n{table.hits('dog', 3, side='out')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = {"smollm2": SMOLLM2.folder, "gemma3": GEMMA3.folder, "demo": demo.path("base")}
    parser.add_argument("model", nargs="?", choices=folders, default="smollm2")
    parser.add_argument("--nouns", type=int, default=len(NOUNS), help="how many; of the demo, all its concepts")
    parser.add_argument("--hits", type=int, default=10, help="of each way to search")
    parser.add_argument("--ways", default=";".join(WAYS), help="to search, with semicolons between them")
    parser.add_argument("--prompts", type=int, default=len(NEUTRAL_PROMPTS), help="neutral ones")
    parser.add_argument("--controls", type=int, default=20, help="a neuron")
    parser.add_argument("--texts", type=int, default=60, help="that tell the neurons' ranges")
    parser.add_argument("--time", action="store_true", help="of a table of 100 concepts, and nothing else")
    given = parser.parse_args()
    ways = asked_names(parser, "--ways", given.ways, WAYS)
    folder = folders[given.model]
    if given.time:
        print(timed(folder))
        return
    words = [concept.word for concept in demo.CONCEPTS] if given.model == "demo" else NOUNS[: given.nouns]
    sizes = {"hits": given.hits, "prompts": given.prompts, "controls": given.controls}
    frame = measure(load_model(str(folder)), folder, words, demo.texts(given.texts), ways=ways, **sizes)
    table = summary(frame, words, given.hits).assign(concepts=len(words), **sizes)
    table = kept(RESULTS / f"concept_search_{given.model}.csv", table, ["way"])
    print(table.to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
