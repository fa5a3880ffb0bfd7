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
from tl_flash.progress import track

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 128
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bench(
    n: int = 512,
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
        starts; its row says how long that takes.

    Raises:
        ValueError: a size below 1, or an unknown dtype.

    Example:
        >>> from tl_flash.bench import bench
        >>> bench(8, 16, 100, rounds=1).contender.tolist()
        ['tl_flash', 'matrix product alone', 'plain definition', 'preparing the unembedding']
    """
    import pandas as pd

    for name, size in (("n", n), ("d_model", d_model), ("d_vocab", d_vocab), ("rounds", rounds)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected 1 or more, got {size!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    place = torch.device(device or "cpu")
    generator = torch.Generator(place).manual_seed(0)
    x, rows = (
        (torch.randn(size, d_model, generator=generator, device=place) / math.sqrt(d_model)).to(DTYPES[dtype])
        for size in (n, d_vocab)
    )
    W_U = rows.T
    unembedding, wide = kernel.prepare(W_U), W_U.float()
    runs: dict[str, Callable[[], object]] = {
        "tl_flash": lambda: kernel.decode(x, unembedding, k=k),
        "matrix product alone": lambda: _products(x.float(), wide),
        "plain definition": lambda: [kernel.reference_decode(part, wide, k=k) for part in x.split(_ROWS)],
        "preparing the unembedding": lambda: kernel.prepare(W_U),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    turns = [name for turn in range(rounds + 1) for name in runs]
    for i, name in enumerate(track(turns, "timing", progress, total=len(turns))):
        seconds = _seconds(runs[name], place)
        if i >= len(runs):
            took[name].append(seconds)
    medians = {name: statistics.median(times) for name, times in took.items()}
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


def _products(x: Tensor, W_U: Tensor) -> None:
    """The floor in float32: nothing but the product, into a buffer that is used again."""
    scores = torch.empty(min(_ROWS, len(x)), W_U.shape[1], device=x.device)
    for part in x.split(_ROWS):
        torch.mm(part, W_U, out=scores[: len(part)])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
