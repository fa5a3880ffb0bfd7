"""Time the engine beside its floor and its rivals: python -m benchmarks [--only gpt-2] [--device cuda] ..."""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from benchmarks.contenders import OURS, SHAPES, K, Shape, contenders
from benchmarks.measure import asked_device, device_name, exponent, peak_extra_mib, stem
from tl_flash.bench import draw, interleaved
from tl_flash.kernel import decode, prepare, reference_decode, screens

RESULTS = Path(__file__).parent / "results"
GROWTH = {  # a factor of 16 each: (rows, d_vocab, d_model)
    "rows": [(512 * f, 32768, 4096) for f in (1, 2, 4, 8, 16)],
    "vocabulary": [(2048, 32768 * f, 4096) for f in (1, 2, 4, 8, 16)],
    "width": [(512, 32768, 256 * f) for f in (1, 2, 4, 8, 16)],
}


SAMPLE = 64  # directions whose tokens are compared with those of a float64 product


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, and file the results under the device's name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--rows", type=int, help="directions a shape; by default all, of larger models a slice on a CPU"
    )
    parser.add_argument("--most-rows", type=int, help="directions that float32 contenders read; 1024 on a CPU, or all")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, of which the median is told")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="the shapes whose name holds this, or growth")
    parser.add_argument("--skip", default="", help="contenders to leave out: those whose name matches this pattern")
    parser.add_argument("--no-bf16", action="store_true", help="as on a device that multiplies bf16 no faster")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    chosen = [shape for shape in SHAPES if args.only.lower() in shape.name.lower()]
    grows = args.only.lower() in ("", "growth")
    if not chosen and not grows:
        names = ", ".join(shape.name for shape in SHAPES)
        parser.error(f"--only: expected a part of {names}, or growth, got {args.only}")
    if args.skip and re.search(args.skip, OURS):
        parser.error(f"--skip: {args.skip} leaves out {OURS!r}, which all are compared with")
    for option in ("rows", "most_rows", "rounds", "threads"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')}: expected 1 or more, got {getattr(args, option)}")
    torch.set_num_threads(args.threads)
    device = asked_device(parser, args.device)
    name = device_name(device)
    if args.no_bf16:
        screens.fast_dtype = lambda device: None
        name += ", no bf16"
    print(f"{name}; torch {torch.__version__}\n")
    base = args.output / stem(name)
    args.output.mkdir(parents=True, exist_ok=True)
    speed = []
    for shape in chosen:
        rows = min(args.rows or (shape.cpu_rows if device.type == "cpu" else shape.n_neurons), shape.n_neurons)
        most_rows = args.most_rows or (1024 if device.type == "cpu" else rows)
        speed += race(shape, rows, most_rows, args.rounds, args.skip, device)
    if chosen:
        pd.DataFrame(speed).to_csv(f"{base}-speed.csv", index=False)
    if grows:
        pd.DataFrame(growth(args.rounds, device)).to_csv(f"{base}-growth.csv", index=False)
    tables = [Path(f"{base}-{table}.csv") for table in ("speed", "growth")]
    if all(path.exists() for path in tables):
        speed_table, growth_table = (pd.read_csv(path) for path in tables)
        figure(speed_table, growth_table, name).write_html(base.with_suffix(".html"), include_plotlyjs="cdn")
    print(f"\nwritten beside {base.with_suffix('.html')}")


def race(shape: Shape, rows: int, most_rows: int, rounds: int, skip: str, device: torch.device) -> list[dict]:
    """Time every contender on one shape, and print a table."""
    x, W_U = draw(rows, shape.d_model, shape.d_vocab, shape.dtype, device)
    dtype = str(shape.dtype).removeprefix("torch.")
    print(f"{shape.name}: {rows:,} of {shape.n_neurons:,} neurons, {shape.d_model} x {shape.d_vocab:,}, {dtype}")
    field = [c for c in contenders(x, W_U, most_rows) if not (skip and re.search(skip, c.name))]
    decode(x[:64], prepare(W_U))  # warm up
    took = interleaved({c.name: c.run for c in field if c.run}, rounds, device)
    a_row = {c.name: statistics.median(took[c.name]) / c.rows for c in field if c.run}
    floor = min((each for name, each in a_row.items() if name.startswith("product")), default=math.nan)
    table = []
    print(f"  {'':30}{'rows':>8}{'seconds':>10}{'of ours':>10}{'of floor':>10}{'MiB':>10}")
    for c in field:
        row = {"shape": shape.name, "contender": c.name, "rows": c.rows, "of": shape.n_neurons}
        row |= {"d_model": shape.d_model, "d_vocab": shape.d_vocab, "dtype": dtype}
        if c.run is None:
            row["note"] = c.note
            print(f"  {c.name:30}{c.note}")
        else:
            row["seconds"] = round(a_row[c.name] * c.rows, 5)
            row["times_ours"] = round(a_row[c.name] / a_row[OURS], 3)
            row["times_floor"] = round(a_row[c.name] / floor, 3)
            row["peak_extra_mib"] = round(peak_extra_mib(c.run, device), 1)
            numbers = (f"{row[key]:>10.4g}" for key in ("seconds", "times_ours", "times_floor", "peak_extra_mib"))
            print(f"  {c.name:30}{c.rows:>8,}{''.join(numbers)}")
        table.append(row)
    readout = decode(x, prepare(W_U), k=K)
    some = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:SAMPLE]
    right = reference_decode(x[some.to(device)].double(), W_U.double(), k=K, dtype=torch.float64)
    differ = int((readout.ids[:, some] != right.ids).sum())
    print(f"  rows repaired: {readout.repaired}; a whole map at this rate: {a_row[OURS] * shape.n_neurons:.1f} s")
    print(f"  tokens of {len(some)} rows that are not those of a float64 product: {differ} of {right.ids.numel()}\n")
    ours = next(row for row in table if row["contender"] == OURS)
    ours |= {"repaired": readout.repaired, "ids_that_differ": differ, "ids_compared": right.ids.numel()}
    return table


def growth(rounds: int, device: torch.device) -> list[dict]:
    """Time the decode over a factor of 16 in each size."""
    table = []
    for what, sizes in GROWTH.items():
        runs = {str(size): _decode_of(*size, device) for size in sizes}
        took = {size: statistics.median(times) for size, times in interleaved(runs, rounds, device).items()}
        slope = exponent([1, 2, 4, 8, 16], took.values())
        print(
            f"time grows with {what} to the power {slope:.3f} (from {sizes[0]} to {sizes[-1]}: rows, d_vocab, d_model)"
        )
        for (n, d_vocab, d_model), spent in zip(sizes, took.values(), strict=True):
            sized = {"rows": n, "d_vocab": d_vocab, "d_model": d_model}
            table.append({"growing": what, **sized, "seconds": round(spent, 5), "exponent": round(slope, 4)})
    return table


def _decode_of(n: int, d_vocab: int, d_model: int, device: torch.device) -> Callable[[], object]:
    x, W_U = draw(n, d_model, d_vocab, torch.bfloat16, device)
    prepared = prepare(W_U)
    return lambda: decode(x, prepared)


def figure(speed: pd.DataFrame, grown: pd.DataFrame, title: str) -> go.Figure:
    """Seconds of every contender, and how the decode's grow."""
    titles = (f"Seconds a direction, beside those of {OURS!r}", "Seconds as one size grows 16-fold")
    panels = make_subplots(1, 2, subplot_titles=titles)
    for name, of in speed.dropna(subset="times_ours").groupby("contender", sort=False):
        panels.add_bar(x=of["shape"], y=of.times_ours, name=name, row=1, col=1)
    for what, of in grown.groupby("growing", sort=False):
        label = f"{what}, power {of.exponent.iloc[0]:.2f}"
        panels.add_scatter(x=[1, 2, 4, 8, 16], y=of.seconds, name=label, mode="lines+markers", row=1, col=2)
    panels.update_xaxes(type="log", title="times the smallest", row=1, col=2)
    panels.update_yaxes(type="log", row=1, col=2)
    return panels.update_layout(title=title, template="plotly_white")


if __name__ == "__main__":
    main()
