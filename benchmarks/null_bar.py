"""How far the null's quantiles are off, with the draws that are decoded and with all of them.

    python -m benchmarks.null_bar [smollm2 | gemma3 | demo] [--layers 0,29] [--side in] [--draws 8192] [--trials 60]

Of a layer many shuffled directions are decoded; their quantiles of the top z-score stand for the truth. In each trial
1,024 of them are drawn, and quantiles taken of all and by `to_decode`, as a map has them. Told is the root mean square
error over the trials.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from benchmarks.real_models import GEMMA3, SMOLLM2
from tl_flash import demo
from tl_flash.decode.null import NULL_DRAWS, null_of, to_decode
from tl_flash.kernel import Unembedding, decode, prepare
from tl_flash.weights import MLPWeights, read

RESULTS = Path(__file__).parent / "results"
QUANTILES = torch.tensor([0.5, 0.9, 0.99, 0.999])


def measure(
    weights: MLPWeights, unembedding: Unembedding, layer: int, side: str, draws: int, trials: int
) -> list[dict[str, float | str]]:
    """A row for either way: the true quantiles' errors, and the 99.9% itself."""
    generator = torch.Generator().manual_seed(layer)
    x = weights.directions(layer, side).float()
    pool = x.gather(0, torch.randint(len(x), (draws, x.shape[1]), generator=generator))
    read_out = decode(pool, unembedding, k=1)
    z = read_out.logits[..., 0] / read_out.std
    truth, errors = z.flatten().quantile(QUANTILES), {"all decoded": [], "as a map has it": []}
    for _ in range(trials):
        some = torch.randint(draws, (NULL_DRAWS,), generator=generator)
        errors["all decoded"].append(z[:, some].flatten().quantile(QUANTILES) - truth)
        own = null_of(decode(to_decode(pool[some], unembedding), unembedding, k=1))["null.z"]
        errors["as a map has it"].append(own.quantile(QUANTILES) - truth)
    rows: list[dict[str, float | str]] = []
    for name, found in errors.items():
        off = torch.stack(found).square().mean(0).sqrt()
        of_each = {f"off at {share:.1%}": float(one) for share, one in zip(QUANTILES.tolist(), off, strict=True)}
        rows.append({"layer": layer, "null": name, "99.9%": float(truth[-1])} | of_each)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = {"smollm2": SMOLLM2.folder, "gemma3": GEMMA3.folder, "demo": demo.path("base")}
    parser.add_argument("model", nargs="?", choices=folders, default="smollm2")
    parser.add_argument("--layers", default="", help="by default the first, the middle and the last")
    parser.add_argument("--side", default="in")
    parser.add_argument("--draws", type=int, default=8192)
    parser.add_argument("--trials", type=int, default=60)
    given = parser.parse_args()
    weights = read(folders[given.model])
    layers = [int(layer) for layer in given.layers.split(",") if layer]
    layers = layers or [0, weights.n_layers // 2, weights.n_layers - 1]
    unembedding = prepare(weights.W_U, gain=weights.final_gain, centre=weights.centre)
    rows = [
        row for layer in layers for row in measure(weights, unembedding, layer, given.side, given.draws, given.trials)
    ]
    frame = pd.DataFrame(rows)
    RESULTS.mkdir(exist_ok=True)
    frame.to_csv(RESULTS / f"null_bar_{given.model}.csv", index=False, float_format="%.4f")
    print(frame.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
