"""Does what `explain` attributes hold? python -m benchmarks.explanations smollm2 [--prompts 40]

On prompts of five kinds (facts, agreement, induction, code, arithmetic), some 200 neurons at positions each: the 40
first by every rule, and random ones. Each is set to zero alone; the change of the predicted token's centred logit is
correlated with what each rule attributes, over all of them, by layer third, and over those that write less than a tenth
of the residual stream. Then, how many neurons restore 80% of the logit, by the order of two rules and against two
references, beside random order. At last the seconds of a prompt of some 20 tokens.
"""

from __future__ import annotations

import argparse
import time
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
TWENTY = "When the ferry reached the harbour in the early morning, the passengers who had slept on its deck"


def measured(
    model: Any, weights: Any, prompt: str, mean: Tensor, generator: torch.Generator
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """What each rule attributes to some neurons at positions, beside what was measured; and how few restore 80%."""
    row = Prompts.of(model, [prompt]).rows[0]
    seen = {rule: attribute(model, row, None, None, rule) for rule in RULES}
    plain, zeros = seen["gradient"], torch.zeros_like(mean)
    ranked = torch.ones_like(plain.act, dtype=torch.bool)
    ranked[:, : int(row[0]) == model.tokenizer.bos_token_id] = False
    ranked = ranked.flatten().nonzero()[:, 0]
    gives = {rule: one.strength(zeros).flatten() for rule, one in seen.items()}
    chosen = torch.cat([ranked[gave[ranked].abs().topk(FIRST).indices] for gave in gives.values()]).unique()
    random = ranked[torch.randperm(len(ranked), generator=generator)]
    spots = torch.cat([chosen, random[: SPOTS - len(chosen)]])
    table: dict[str, Any] = {
        "third": 3 * (spots // plain.act[0].numel()) // len(plain.act),
        "removed": plain.score - Ablation(model, row, plain.target, zeros).alone(spots),
        "length": plain.lengths(weights).flatten()[spots],
    }
    table |= {rule: gave[spots] for rule, gave in gives.items()}
    token, curves = weights.vocab.string(plain.target.token), []
    for reference, values in (("zero", zeros), ("mean", mean)):
        ablation = Ablation(model, row, plain.target, values)
        few = {"random": _few(ablation, random, plain.score)}
        for rule in ("gradient", "relp"):
            gave = seen[rule].strength(values).flatten()[ranked]
            few[rule] = _few(ablation, ranked[gave.argsort(descending=True)], plain.score)
        curves.append({"token": token, "reference": reference, "all": len(ranked)} | few)
    return pd.DataFrame({name: column.numpy() for name, column in table.items()}), curves


def _few(ablation: Ablation, order: Tensor, whole: float) -> int:
    """How many of the first, kept, restore 80% of what all do."""
    counts = counts_to(len(order))
    none, *kept = ablation.scores([order, *(order[at:] for at in counts)], "keeping neurons").tolist()
    scores = torch.tensor(kept)
    return Curve(tuple(counts), whole, none, scores, scores, scores, scores).suffices()


def correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Of what is attributed with what was measured, a row a rule and a part of the model."""
    parts = {
        "first third": frame.third == 0,
        "second third": frame.third == 1,
        "last third": frame.third == 2,
        "all": frame.third >= 0,
        "all that write under 10%": frame.length < LONG,
    }
    rows = []
    for rule in RULES:
        for name, where in parts.items():
            some = frame.loc[where, ["prompt", "removed", rule]]
            each = [one[rule].corr(one["removed"]) for _, one in some.groupby("prompt")]
            rows.append(
                {
                    "rule": rule,
                    "part": name,
                    "spots": len(some),
                    "correlation": some[rule].corr(some["removed"]),
                    "spearman": some[rule].corr(some["removed"], method="spearman"),
                    "median_of_prompts": pd.Series(each).median(),
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
    parser.add_argument("--prompts", type=int, default=40, help="how many, of the kinds in turn; 0: seconds alone")
    arguments = parser.parse_args()
    source = {"smollm2": SMOLLM2, "gemma3": GEMMA3}[arguments.model]
    model = load_model(str(source.folder))
    weights, stats = read(model), activation_stats(model, own_texts(model).rows[::4])
    kinds = [(kind, several[turn]) for turn in range(8) for kind, several in PROMPTS.items()][: arguments.prompts]
    generator = torch.Generator().manual_seed(0)
    frames, curves = [], []
    name = f"explanations_{arguments.model}"
    table = of_prompts = pd.DataFrame()
    for at, (kind, prompt) in enumerate(kinds):
        frame, few = measured(model, weights, prompt, stats.mean, generator)
        frames.append(frame.assign(prompt=at))
        curves += [{"kind": kind, "prompt": prompt} | row for row in few]
        table, of_prompts = correlations(pd.concat(frames)), pd.DataFrame(curves)
        table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.3f")
        of_prompts.to_csv(RESULTS / f"{name}_curves.csv", index=False)
        print(f"{at + 1}: {prompt!r}", *few, sep="\n", flush=True)
    if frames:
        print(table.to_string(index=False, float_format="{:.3f}".format))
        print(of_prompts.groupby("reference").median(numeric_only=True).to_string())
    print(seconds(model, stats).to_string(index=False))


if __name__ == "__main__":
    main()
