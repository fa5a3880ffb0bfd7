"""Measure all that a GPU is asked for, in one call: python -m benchmarks.gpu [--output FOLDER].

The up-projections of three shapes beside the products alone and the plain definition, with peak memory and a sample of
ids against float64; flash_decode of whole models; few directions; how time grows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import __main__ as speed
from benchmarks import directions, whole


def main() -> None:
    """Run all, each of which prints and files its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=speed.RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device; python -m benchmarks measures a CPU")
    there = ["--device", "cuda", "--output", str(args.output)]
    speed.main(["--most-rows", "8192", *there])
    whole.main(["gpt-2", "llama-3.1-8b", *there])
    directions.main(["--most", "32768", *there])


if __name__ == "__main__":
    main()
