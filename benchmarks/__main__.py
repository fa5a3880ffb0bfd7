"""Time the engine beside its floor and its rivals: python -m benchmarks [--rows 512] [--device cuda] ..."""

from __future__ import annotations

import argparse
import csv
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from benchmarks.contenders import SHAPES, Shape, contenders
from benchmarks.measure import device_name, exponent, interleaved, peak_extra_mib
from tl_flash.kernel import decode, prepare

RESULTS = Path(__file__).parent / "results"
GROWTH = {  # a factor of 16 each: (rows, d_vocab, d_model)
    "rows": [(512 * f, 16384, 256) for f in (1, 2, 4, 8, 16)],
    "vocabulary": [(256, 16384 * f, 256) for f in (1, 2, 4, 8, 16)],
    "width": [(256, 16384, 256 * f) for f in (1, 2, 4, 8, 16)],
}


def main() -> None:
    """Run, print, and file the results under the device's name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="directions a shape; by default 256 on a CPU, all on a GPU")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, of which the median is told")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", help="the shapes whose name holds this")
    parser.add_argument("--skip", default="", help="contenders to leave out: those whose name matches this pattern")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"{device_name(device)}; torch {torch.__version__}\n")
    speed = []
    for shape in SHAPES:
        if not args.only or args.only.lower() in shape.name.lower():
            rows = min(args.rows or (256 if device.type == "cpu" else shape.n_neurons), shape.n_neurons)
            speed += race(shape, rows, args.rounds, args.skip, device)
    grown = growth(args.rounds, device)
    stem = args.output / re.sub(r"\W+", "-", device_name(device)).strip("-").lower()
    args.output.mkdir(parents=True, exist_ok=True)
    write(stem, speed, grown)
    figure(speed, grown, device).write_html(stem.with_suffix(".html"), include_plotlyjs="cdn")
    print(f"\nwritten: {stem}-speed.csv, {stem}-growth.csv, {stem}.html")


def race(shape: Shape, rows: int, rounds: int, skip: str, device: torch.device) -> list[dict]:
    """Time every contender on one shape, and print a table."""
    x, W_U = shape.draw(rows, device)
    size = f"{rows:,} of {shape.n_neurons:,} neurons, {shape.d_model} x {shape.d_vocab:,}, {shape.dtype}"
    print(f"{shape.name}: {size}")
    field = [(name, run) for name, run in contenders(x, W_U) if not (skip and re.search(skip, name))]
    runs: dict[str, Callable[[], object]] = {name: run for name, run in field if callable(run)}
    took = interleaved(runs, rounds, device)
    median = {name: statistics.median(times) for name, times in took.items()}
    table = []
    for name, run in field:
        row = {"shape": shape.name, "contender": name, "rows": rows, "of": shape.n_neurons}
        row |= {"d_model": shape.d_model, "d_vocab": shape.d_vocab, "dtype": str(shape.dtype).removeprefix("torch.")}
        if callable(run):
            row["seconds"] = round(median[name], 5)
            row["times_ours"] = round(median[name] / median["tl_flash: decode"], 3)
            row["peak_extra_mib"] = round(peak_extra_mib(run, device), 1)
        else:
            row["note"] = run
        table.append(row)
        told = [f"{row.get(key, '-'):>12}" for key in ("seconds", "times_ours", "peak_extra_mib")]
        print(f"  {name:24}{''.join(told)}  {row.get('note', '')}")
    repaired = decode(x, prepare(W_U)).repaired
    whole = median["tl_flash: prepare"] + median["tl_flash: decode"] * shape.n_neurons / rows
    print(f"  rows repaired: {repaired}; a whole map at this rate, preparing W_U included: {whole:.1f} s\n")
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
    x, W_U = Shape("", n, d_model, d_vocab, torch.float32).draw(n, device)
    unembedding = prepare(W_U)
    return lambda: decode(x, unembedding)


def write(stem: Path, speed: list[dict], grown: list[dict]) -> None:
    """One CSV a table."""
    for name, table in (("speed", speed), ("growth", grown)):
        columns = list(dict.fromkeys(key for row in table for key in row))
        with open(f"{stem}-{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(table)


def figure(speed: list[dict], grown: list[dict], device: torch.device) -> go.Figure:
    """Seconds of every contender, and how the decode's grow."""
    panels = make_subplots(1, 2, subplot_titles=("Seconds, beside tl_flash's", "Seconds as one size grows 16-fold"))
    for name in dict.fromkeys(row["contender"] for row in speed):
        of = [row for row in speed if row["contender"] == name and "times_ours" in row]
        panels.add_bar(x=[row["shape"] for row in of], y=[row["times_ours"] for row in of], name=name, row=1, col=1)
    for what in dict.fromkeys(row["growing"] for row in grown):
        of = [row for row in grown if row["growing"] == what]
        label = f"{what}, power {of[0]['exponent']:.2f}"
        took = [row["seconds"] for row in of]
        panels.add_scatter(x=[1, 2, 4, 8, 16], y=took, name=label, mode="lines+markers", row=1, col=2)
    panels.update_xaxes(type="log", title="times the smallest", row=1, col=2)
    panels.update_yaxes(type="log", row=1, col=2)
    return panels.update_layout(title=device_name(device), template="plotly_white")


if __name__ == "__main__":
    main()
