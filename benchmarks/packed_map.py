"""A whole map from a quantised file and from the same numbers in a folder: python -m benchmarks.packed_map [gemma3].

The Q4_1 file of SmolLM2 and the Q4_K_M file of Gemma 3 270M beside their dequantised float32 folders (`make models`):
whether the ids are the same, and what each decode takes. Each runs in a process of its own, in turn, so that the most
memory resident is its own, libraries and the mapped pages of the file included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import pandas as pd
import torch

from benchmarks.real_models import GEMMA3, SMOLLM2, RealModel
from tl_flash import NeuronMap, flash_decode

MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed_map", description=__doc__)
    parser.add_argument("model", nargs="?", choices=MODELS, help="by default both")
    parser.add_argument("--side", default="in", choices=["in", "gate", "out"])
    args = parser.parse_args()
    for name, model in MODELS.items():
        if args.model in (None, name):
            print(name, pd.DataFrame(beside(model, args.side)).to_string(index=False), sep="\n")


def beside(model: RealModel, side: str) -> list[dict]:
    """A row a source."""
    rows, maps = [], []
    for source in (model.gguf, model.folder):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            neurons, row = process.apply(decoded, (source, side))
        size = sum(path.stat().st_size for path in ([source] if source.is_file() else source.glob("*.safetensors")))
        rows.append({"source": source.name, "on disk, MB": round(size / 1e6)} | row)
        maps.append(neurons)
    differ = sum(int((getattr(maps[0], p).ids != getattr(maps[1], p).ids).sum()) for p in ("positive", "negative"))
    gap = max(float((getattr(maps[0], p).z - getattr(maps[1], p).z).abs().max()) for p in ("positive", "negative"))
    return [row | {"ids that differ": differ, "largest difference of z": gap} for row in rows]


def decoded(source: Path, side: str) -> tuple[NeuronMap, dict]:
    """The map, its seconds and the most memory resident."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    neurons = flash_decode(source, side=side, progress=False)
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    of = {"neurons": neurons.n_layers * neurons.d_mlp, "threads": torch.get_num_threads()}
    return neurons, of | {"seconds": round(took, 1), "MiB resident before": round(before), "at most": round(peak)}


if __name__ == "__main__":
    main()
