"""Gauges of memory and growth, and the device's name."""

from __future__ import annotations

import argparse
import ctypes
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from tl_flash.devices import device_of


def asked_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device that `--device` names, or the parser's error."""
    try:
        device = device_of(name)
    except ValueError as error:
        parser.error(f"--{error}")
    assert device is not None
    return device


def asked_names(parser: argparse.ArgumentParser, option: str, given: str, known: Iterable[str]) -> list[str]:
    """What an option lists with semicolons between them, or the parser's error where one is not known."""
    names, known = given.split(";"), list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: expected some of {'; '.join(known)}, got {'; '.join(unknown)!r}")
    return names


def peak_extra_mib(run: Callable[[], object], device: torch.device) -> float:
    """Most memory held during `run` beyond what was held before it; NaN where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give back what was freed
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    except (OSError, AttributeError):
        return math.nan
    before = _high_water_mib()
    run()
    return _high_water_mib() - before


def exponent(sizes: Iterable[float], took: Iterable[float]) -> float:
    """Slope of log(seconds) over log(size)."""
    x, y = [math.log(size) for size in sizes], [math.log(t) for t in took]
    return statistics.linear_regression(x, y).slope


def device_name(device: torch.device) -> str:
    """What the results are filed under."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else "CPU"
    return f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def stem(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


def _high_water_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
