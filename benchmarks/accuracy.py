"""Errors of the engine's statistics on trained weights: python -m benchmarks.accuracy [--model smollm2] [--rows 256].

All sides of the first, the middle and the last layer, against float64: the worst row of each, screened in float32 and
in bf16, whatever is faster here; with --device cuda on a GPU, in float32 and in float16.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from unittest import mock

import pandas as pd
import torch
from torch import Tensor

from benchmarks.__main__ import RESULTS
from benchmarks.measure import asked_device, device_name, stem
from benchmarks.real_models import MODELS
from tl_flash.kernel import Readout, Unembedding, decode, prepare, reference_decode, unembedding
from tl_flash.progress import track
from tl_flash.weights import MLPWeights, read

STATISTICS = ["log_z", "std", "kurtosis", "ids_that_differ"]
SCREENS = {
    "cpu": {"float32": None, "bf16": torch.bfloat16},
    "cuda": {"float32": None, "float16": torch.float16},
}
AT_A_TIME = 16  # rows of float64 scores


def main() -> None:
    """Run, print and file the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--model", choices=[model.name for model in MODELS], help="by default both")
    parser.add_argument("--rows", type=int, default=256, help="neurons of each layer and side")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = asked_device(parser, args.device)
    if args.rows < 1:
        parser.error(f"--rows: expected 1 or more, got {args.rows}")
    for model in MODELS:
        if args.model in (None, model.name):
            table = pd.DataFrame(errors(read(str(model.folder)), args.rows, device))
            of = "" if device.type == "cpu" else f"_{stem(device_name(device))}"
            table.to_csv(RESULTS / f"accuracy_{model.name}{of}.csv", index=False)
            print(model.name, pd.pivot_table(table, index="screen", values=STATISTICS, aggfunc="max"), sep="\n")


def errors(weights: MLPWeights, n: int, device: torch.device) -> Iterator[dict]:
    """A row a screen, layer and side."""
    screens = {screen: _prepared(weights, low, device) for screen, low in SCREENS[device.type].items()}
    layers = (0, weights.n_layers // 2, weights.n_layers - 1)
    for layer in track(layers, "layers", None, total=len(layers)):
        for side in weights.sides:
            x = weights.directions(layer, side)
            x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(layer))[:n]]
            found = {screen: decode(x, u) for screen, u in screens.items()}
            right = [_truth(part, weights, device) for part in x.split(AT_A_TIME)]
            for screen, readout in found.items():
                yield {"screen": screen, "layer": layer, "side": side, "rows": len(x)} | _worst(readout, right)


def _prepared(weights: MLPWeights, low: torch.dtype | None, device: torch.device) -> Unembedding:
    with (
        mock.patch.object(unembedding, "screened_in", lambda W_U: low),
        mock.patch.object(unembedding, "ROWS_TO_PAY", 0),
    ):
        return prepare(weights.W_U, gain=weights.final_gain, centre=weights.centre, device=device)


def _truth(x: Tensor, weights: MLPWeights, device: torch.device) -> Readout:
    gain = None if weights.final_gain is None else weights.final_gain.to(device, torch.float64)
    x, W_U = x.to(device, torch.float64), weights.W_U.to(device, torch.float64)
    return reference_decode(x, W_U, gain=gain, centre=weights.centre, dtype=torch.float64)


def _worst(found: Readout, parts: list[Readout]) -> dict[str, float]:
    def of(name: str, dim: int) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim)

    kurtosis = of("kurtosis", 0)
    return {
        "log_z": float((found.log_z - of("log_z", 1)).abs().max()),
        "std": float((found.std / of("std", 0) - 1).abs().max()),
        "kurtosis": float(((found.kurtosis - kurtosis) / (kurtosis.abs() + 1)).abs().max()),
        "ids_that_differ": int((found.ids != of("ids", 1)).sum()),
    }


if __name__ == "__main__":
    main()
