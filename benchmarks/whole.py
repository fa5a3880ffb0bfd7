"""Time flash_decode of a whole model beside the matrix product of its neurons: python -m benchmarks.whole [gpt-2].

SmolLM2-135M (`make models`), and random weights of GPT-2 small's shape as a HookedTransformer: from the model to its
map in memory, null, write check and fingerprint included, nothing kept from before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from benchmarks.__main__ import RESULTS
from benchmarks.measure import device_name, stem
from benchmarks.real_models import SMOLLM2
from tl_flash import flash_decode, load_model
from tl_flash.bench import interleaved, products
from tl_flash.kernel import fast_dtype, forget
from tl_flash.weights import read

CPU = torch.device("cpu")


def main() -> None:
    """Run, print and file the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole", description=__doc__)
    parser.add_argument("model", nargs="?", choices=["smollm2", "gpt-2"], help="by default both")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, of which the median is told")
    args = parser.parse_args()
    makers = {"smollm2": lambda: load_model(str(SMOLLM2.folder), surface="bridge"), "gpt-2": gpt2_shaped}
    table = [{"model": name} | race(make(), args.rounds) for name, make in makers.items() if args.model in (None, name)]
    found = pd.DataFrame(table)
    print(found.to_string(index=False))
    found.to_csv(RESULTS / f"whole-{stem(device_name(CPU))}.csv", index=False)


def gpt2_shaped() -> Any:
    """Random weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=12, d_model=768, d_head=64, n_heads=12, n_ctx=64, d_vocab=50257, act_fn="gelu_new", seed=0
    )
    return HookedTransformer(config)


def race(model: Any, rounds: int) -> dict[str, Any]:
    """Median seconds of the decode and of the product alone, in float32 and where it is faster in bf16."""
    weights = read(model)
    rows = torch.cat([weights.directions(layer, "in").float() for layer in range(weights.n_layers)])
    W_U = weights.W_U.float()

    def decode() -> None:
        forget()
        flash_decode(model, progress=False)

    runs: dict[str, Callable[[], object]] = {"flash_decode": decode, "product, float32": lambda: products(rows, W_U)}
    if low := fast_dtype(CPU):
        low_rows, low_W = rows.to(low), W_U.to(low)
        runs["product, bf16"] = lambda: products(low_rows, low_W)
    took = {name: statistics.median(seconds) for name, seconds in interleaved(runs, rounds, CPU).items()}
    floor = min(seconds for name, seconds in took.items() if name.startswith("product"))
    rounded = {name: round(seconds, 2) for name, seconds in took.items()}
    return {"neurons": len(rows)} | rounded | {"of_floor": round(took["flash_decode"] / floor, 2)}


if __name__ == "__main__":
    main()
