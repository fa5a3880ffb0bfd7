"""Does what `explain` attributes hold? python -m benchmarks.explanations smollm2 [--prompts 40]

On prompts of five kinds (facts, agreement, induction, code, arithmetic), some 200 neurons at positions each: the 40
first by every rule, and random ones. Each is set to zero alone; the change of the predicted token's centred logit is
correlated with what each rule attributes, over all of them, by layer third, and over those that write less than a tenth
of the residual stream. Then, how many neurons restore 80% of the logit: by the order of each rule, by that of `explain`
with what it measures, and by a random one. At last the seconds of a prompt of 20 tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor

from benchmarks.explanation_prompts import PROMPTS
from benchmarks.real_models import GEMMA3, SMOLLM2
from tl_flash import ActivationStats, activation_stats, explain, load_model
from tl_flash.clamps import Prompts
from tl_flash.evidence import Curve
from tl_flash.evidence.ablation import Ablation, counts_to
from tl_flash.evidence.attribution import attribute
from tl_flash.lens import Rule, own_texts
from tl_flash.weights import read

RESULTS = Path(__file__).parent / "results"
SPOTS, FIRST, LONG = 200, 40, 0.1
RULES: tuple[Rule, ...] = get_args(Rule)
TWENTY = "When the ferry reached the harbour in the early morning, the passengers"


def spots_of(model: Any, weights: Any, prompt: str, generator: torch.Generator) -> tuple[pd.DataFrame, dict[str, int]]:
    """What each rule attributes to some neurons at positions beside what was measured, and how few restore 80%."""
    row = Prompts.of(model, [prompt]).rows[0]
    seen = {rule: attribute(model, row, None, None, rule) for rule in RULES}
    plain = seen["gradient"]
    zeros = torch.zeros(plain.act.shape[0], plain.act.shape[2])
    ranked = torch.ones_like(plain.act, dtype=torch.bool)
    ranked[:, : int(row[0]) == model.tokenizer.bos_token_id] = False
    ranked = ranked.flatten().nonzero()[:, 0]
    gives = {rule: one.strength(zeros).flatten() for rule, one in seen.items()}
    orders = {rule: ranked[gave[ranked].abs().argsort(descending=True)] for rule, gave in gives.items()}
    chosen = torch.cat([order[:FIRST] for order in orders.values()]).unique()
    drawn = ranked[torch.randperm(len(ranked), generator=generator)[: SPOTS - len(chosen)]]
    spots = torch.cat([chosen, drawn])
    ablation = Ablation(model, row, plain.target, zeros)
    table: dict[str, Any] = {
        "third": 3 * (spots // plain.act[0].numel()) // len(plain.act),
        "removed": plain.score - ablation.alone(spots),
        "length": plain.lengths(weights).flatten()[spots],
    }
    table |= {rule: gave[spots] for rule, gave in gives.items()}
    few = {rule: _few(ablation, order, plain.score) for rule, order in orders.items() if rule != "frozen"}
    return pd.DataFrame({name: column.numpy() for name, column in table.items()}), few


def _few(ablation: Ablation, order: Tensor, whole: float) -> int:
    counts = counts_to(len(order))
    none, *kept = ablation.scores([order, *(order[at:] for at in counts)], "keeping neurons").tolist()
    scores = torch.tensor(kept)
    return Curve(tuple(counts), whole, none, scores, scores, scores, scores).suffices()


def correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Of what is attributed with what was measured, a row a rule and a part of the model."""
    parts: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
        "first third": lambda f: f[f.third == 0],
        "second third": lambda f: f[f.third == 1],
        "last third": lambda f: f[f.third == 2],
        "all": lambda f: f,
        "all that write under 10%": lambda f: f[f.length < LONG],
    }
    rows = []
    for rule in RULES:
        for name, part in parts.items():
            some = part(frame)
            rows.append(
                {
                    "rule": rule,
                    "part": name,
                    "spots": len(some),
                    "correlation": some[rule].corr(some.removed),
                    "spearman": some[rule].corr(some.removed, method="spearman"),
                    "per_prompt": part(frame).groupby("prompt").apply(lambda f, r=rule: f[r].corr(f.removed)).median(),
                }
            )
    return pd.DataFrame(rows)


def seconds(model: Any, stats: ActivationStats) -> pd.DataFrame:
    """Of a prompt of some 20 tokens, measured and not."""
    rows = []
    ways: dict[str, dict[str, Any]] = {
        "measure=False": {"measure": False},
        "measure=True, stats given": {"stats": stats},
        "measure=True": {},
    }
    for name, options in ways.items():
        start = time.perf_counter()
        found = explain(model, TWENTY, **options)
        rows.append({"way": name, "tokens": len(found.prompt), "seconds": time.perf_counter() - start})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["smollm2", "gemma3"])
    parser.add_argument("--prompts", type=int, default=40, help="how many, of the five kinds in turn")
    arguments = parser.parse_args()
    source = {"smollm2": SMOLLM2, "gemma3": GEMMA3}[arguments.model]
    model = load_model(str(source.folder))
    weights, stats = read(model), activation_stats(model, own_texts(model).rows[::4])
    in_turn = [(kind, one) for several in zip(*PROMPTS.values(), strict=True) for kind, one in zip(PROMPTS, several)]
    generator = torch.Generator().manual_seed(0)
    frames, curves = [], []
    for at, (kind, prompt) in enumerate(in_turn[: arguments.prompts]):
        frame, few = spots_of(model, weights, prompt, generator)
        frames.append(frame.assign(prompt=at))
        found = explain(model, prompt, stats=stats)
        assert found.curve is not None
        few |= {"explain": found.curve.suffices(), "random": found.curve.suffices(random=True)}
        curves.append({"kind": kind, "prompt": prompt, "token": found.token} | few | found.curve.areas())
        print(pd.DataFrame(curves[-1:]).to_string(index=False, header=at == 0), flush=True)
    name = f"explanations_{arguments.model}"
    table, of_prompts = correlations(pd.concat(frames)), pd.DataFrame(curves)
    table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.3f")
    of_prompts.to_csv(RESULTS / f"{name}_prompts.csv", index=False, float_format="%.3f")
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(of_prompts.drop(columns=["kind", "prompt", "token"]).median().to_string())
    print(seconds(model, stats).to_string(index=False))


if __name__ == "__main__":
    main()
