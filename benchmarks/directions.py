"""Time decodes of 1 to 32,768 directions beside the plain definition: python -m benchmarks.directions [--most 2048].

From weights to tokens, nothing prepared: two unembeddings, held in float32 and in bf16, by token as in Hugging Face's
models and by coordinate as in HookedTransformer. The plain definition multiplies in float32, so it converts bf16 first.
Of many directions it reads 1,024 at most; its time is a multiple of that of one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from benchmarks.__main__ import RESULTS
from benchmarks.measure import asked_device, device_name, stem
from tl_flash.bench import draw, interleaved, plain
from tl_flash.kernel import decode, forget, prepare

SHAPES = {"GPT-2 small": (768, 50257), "Llama 3.1 8B": (4096, 128256)}
COUNTS = (1, 8, 64, 512, 2048, 8192, 32768)
MOST_PLAIN, K = 1024, 10
MANY = 1024  # directions from which on `decode_directions` has W_U read at once


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print and file the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.directions", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--most", type=int, default=2048, help="directions at most")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, of which the median is told")
    parser.add_argument("--only", default="", help="the shapes whose name holds this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    device = asked_device(parser, args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    table = []
    for name, (d_model, d_vocab) in SHAPES.items():
        if args.only.lower() not in name.lower():
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for held in ("by token", "by coordinate"):
                for n in (count for count in COUNTS if count <= args.most):
                    row = {"unembedding": name, "dtype": str(dtype).removeprefix("torch."), "held": held}
                    table.append(row | race(n, d_model, d_vocab, dtype, held, args.rounds, device))
                    print(*table[-1].values(), sep="\t", flush=True)
    found = pd.DataFrame(table)
    by = ["unembedding", "dtype", "held"]
    for which in ("first", "again"):
        print(which, found.pivot_table(index=by, columns="directions", values=f"{which}_of_plain"), sep="\n")
    found.to_csv(args.output / f"directions-{stem(device_name(device))}.csv", index=False)


def race(
    n: int, d_model: int, d_vocab: int, dtype: torch.dtype, held: str, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of the plain definition, of a first decode of W_U and of one after it, and the ratios."""
    x, W_U = draw(n, d_model, d_vocab, dtype, device)
    W_U = W_U.T.contiguous().T if held == "by token" else W_U.contiguous()
    some = x[:MOST_PLAIN].float()
    runs = {
        "first": lambda: (forget(), decode(x, prepare(W_U, keep=n >= MANY), k=K)),
        "again": lambda: decode(x, prepare(W_U, keep=n >= MANY), k=K),
        "plain": lambda: plain(some, W_U.float(), K),
    }
    for run in runs.values():
        run()
    took = {name: statistics.median(seconds) for name, seconds in interleaved(runs, rounds, device).items()}
    beside = took.pop("plain") * n / len(some)
    found = {f"{name}_of_plain": round(seconds / beside, 2) for name, seconds in took.items()}
    return {"directions": n, "plain": round(beside, 5)} | {name: round(took[name], 5) for name in took} | found


if __name__ == "__main__":
    main()
