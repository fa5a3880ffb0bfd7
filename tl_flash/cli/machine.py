"""The command that times this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tl_flash.cli.options import Json, jsonable


def bench(
    neurons: Annotated[int, typer.Option(help="Directions to decode.")] = 2048,
    d_model: Annotated[int, typer.Option(help="Width of the residual stream.")] = 768,
    d_vocab: Annotated[int, typer.Option(help="Tokens.")] = 50257,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 3,
    as_json: Json = False,
) -> None:
    """Time a decode of random weights beside the matrix product alone and the plain definition, on this machine.

    Example: `tl-flash bench --d-model 2048 --d-vocab 128256 --dtype bfloat16`
    """
    from tl_flash.bench import bench as measure

    frame = measure(neurons, d_model, d_vocab, dtype=dtype, device=device, rounds=rounds)
    if as_json:
        typer.echo(json.dumps([jsonable(record) for record in frame.to_dict("records")]))
    else:
        typer.echo(frame.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
