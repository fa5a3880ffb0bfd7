"""How fast this machine decodes, beside the matrix product alone and the plain definition."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tl_flash import kernel
from tl_flash.devices import device_of
from tl_flash.kernel import fast_dtype, parts, plain_arithmetic
from tl_flash.progress import track

if TYPE_CHECKING:
    import pandas as pd

ROWS = {"cpu": 512, "cuda": 8192}
"""Directions that a contender other than tl_flash reads at a time."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bench(
    n: int = 2048,
    d_model: int = 768,
    d_vocab: int = 50257,
    *,
    k: int = 10,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    rounds: int = 3,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Time random directions through a random unembedding, the contenders in turn, so that a busy machine slows all.

    Args:
        n: directions.
        d_model: their width; 768 and 50,257 are GPT-2 small's, 4,096 and 128,256 those of Llama 3.1 8B.
        d_vocab: tokens.
        k: tokens to keep at each pole.
        dtype: of the weights: "float32", "float16" or "bfloat16".
        device: where; the CPU by default.
        rounds: how often each is timed, after one run to warm up.
        progress: a bar; by default on a terminal or in a notebook.

    Returns:
        A pandas frame, a row a contender: `contender`, `seconds` (median over rounds), `over_decode` (seconds over
        those of tl_flash's decode) and `directions_per_second`. The unembedding is prepared once, before the clock
        starts; its row says how long that takes. The matrix product alone is the floor of what screens in that dtype;
        beside float32 the one that this device multiplies faster, if there is one.

    Raises:
        ValueError: a size below 1, or an unknown dtype or device.

    Example:
        >>> from tl_flash.bench import bench
        >>> bench(8, 16, 100, rounds=1).contender.tolist()[:3]
        ['tl_flash', 'preparing the unembedding', 'plain definition']
    """
    import pandas as pd

    for name, size in (("n", n), ("d_model", d_model), ("d_vocab", d_vocab), ("rounds", rounds)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected 1 or more, got {size!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    place = device_of(device) or torch.device("cpu")
    x, W_U = draw(n, d_model, d_vocab, DTYPES[dtype], place)
    unembedding, wide = kernel.prepare(W_U), W_U.float()
    runs: dict[str, Callable[[], object]] = {
        "tl_flash": lambda: kernel.decode(x, unembedding, k=k),
        "preparing the unembedding": lambda: (kernel.forget(), kernel.prepare(W_U)),
        "plain definition": lambda: plain(x, wide, k),
        "matrix product alone, float32": lambda: products(x.float(), wide),
    }
    if low := fast_dtype(place):
        few, low_W = x.to(low), W_U.to(low)
        runs[f"matrix product alone, {str(low).removeprefix('torch.')}"] = lambda: products(few, low_W)
    medians = {
        name: statistics.median(times[1:]) for name, times in interleaved(runs, rounds + 1, place, progress).items()
    }
    return pd.DataFrame(
        {
            "contender": list(medians),
            "seconds": list(medians.values()),
            "over_decode": [seconds / medians["tl_flash"] for seconds in medians.values()],
            "directions_per_second": [
                math.nan if name.startswith("preparing") else n / seconds for name, seconds in medians.items()
            ],
        }
    )


def draw(n: int, d_model: int, d_vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random directions [n, d_model], and W_U held [d_vocab, d_model] as lm_head.weight is, then transposed."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        drawn = torch.empty(rows, d_model, dtype=dtype, device=device)
        for part in parts(rows, 4096):
            drawn[part] = torch.randn(drawn[part].shape, generator=generator, device=device) / math.sqrt(d_model)
        return drawn

    return normal(n), normal(d_vocab).T


def products(x: Tensor, W_U: Tensor) -> None:
    """The floor: nothing but the matrix product, into a buffer that is used again."""
    rows = ROWS[x.device.type]
    scores = torch.empty(min(rows, len(x)), W_U.shape[1], dtype=x.dtype, device=x.device)
    with plain_arithmetic(x.device):
        for part in x.split(rows):
            torch.mm(part, W_U, out=scores[: len(part)])


def plain(x: Tensor, W_U: Tensor, k: int) -> None:
    """The plain definition, some rows at a time: a whole layer's scores may not fit."""
    for part in x.split(ROWS[x.device.type] // 2):
        kernel.reference_decode(part, W_U, k=k)


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device, progress: bool | None = None
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, one after the other, so that a busy machine is busy for all of them."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    turns = [name for _ in range(rounds) for name in runs]
    for name in track(turns, "timing", progress, total=len(turns)):
        took[name].append(seconds(runs[name], device))
    return took


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock of one run, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
