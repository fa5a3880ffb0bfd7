"""The command line of the training: ``python -m tl_flash.demo.training``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from tl_flash.demo.training.recipe import Recipe
from tl_flash.demo.training.train import train


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tl_flash.demo.training", description=(__doc__ or "").partition(".")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder to write to and resume from")
    parser.add_argument("--base-only", action="store_true", help="leave out the instruct model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast; slow on a CPU without AVX512-BF16")
    parser.add_argument("--stop-at", type=int, help="stop each stage before this step, to be resumed")
    parser.add_argument("--beside", type=Path, help="training.json of a base run of other length, for the card")
    for field in fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    args = vars(parser.parse_args(argv))
    recipe = Recipe(**{field.name: args.pop(field.name) for field in fields(Recipe)})
    train(args.pop("out"), recipe, **args)


if __name__ == "__main__":
    main()
