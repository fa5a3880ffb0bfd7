"""What is timed: the engine, the bare matrix products under it, and other ways to read directions out."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tl_flash.bench import plain, products
from tl_flash.kernel import decode, forget, prepare, screens

K = 10
LOW = {"bf16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A model's neurons and its unembedding."""

    name: str
    n_neurons: int
    d_model: int
    d_vocab: int
    dtype: torch.dtype
    cpu_rows: int
    #   directions that are timed on a CPU: where all would take many minutes, a slice


SHAPES = [
    Shape("GPT-2 small", 12 * 3072, 768, 50257, torch.float32, 12 * 3072),
    Shape("Llama-3.2-1B", 16 * 8192, 2048, 128256, torch.bfloat16, 8192),
    Shape("Llama-3.1-8B", 32 * 14336, 4096, 128256, torch.bfloat16, 8192),
]

OURS = "tl_flash, preparing W_U included"
"""What the others are compared with: from the weights to the tokens."""


@dataclass(frozen=True)
class Contender:
    """What is timed."""

    name: str
    run: Callable[[], object] | None
    rows: int = 0
    #   directions that it reads
    note: str = ""
    #   why it is not timed


def contenders(x: Tensor, W_U: Tensor, most_rows: int) -> Iterator[Contender]:
    """All give or underlie the top K tokens of every direction.

    What reads a few rows at a time in float32 reads `most_rows` of them at most: its time is a multiple of that of one
    row. It gets W_U in float32, converted before the clock starts.
    """
    prepared, unproven, W = prepare(W_U), prepare(W_U, precision="fast"), W_U.float()
    n, some = len(x), x[:most_rows].float()
    yield Contender(OURS, lambda: (forget(), decode(x, prepare(W_U), k=K)), n)
    yield Contender("tl_flash", lambda: decode(x, prepared, k=K), n)
    yield Contender("tl_flash, no proof", lambda: decode(x, unproven, k=K), n)
    for name, dtype in list(LOW.items())[: 2 if x.is_cuda else 1]:
        if screens.fast_dtype(x.device) is None:
            yield Contender(f"product alone, {name}", None, note="no faster than float32 on this device")
        else:
            low, low_W = x.to(dtype), W_U.to(dtype)
            yield Contender(f"product alone, {name}", partial(products, low, low_W), n)
    yield Contender("product alone, float32", lambda: products(some, W), len(some))
    yield Contender("plain definition", lambda: plain(some, W, K), len(some))
    yield Contender("64-row readout", lambda: _chunked_readout(some, W), len(some))
    if x.is_cuda:
        yield Contender("faiss-cpu IndexFlatIP", None, note="not on a GPU")
    elif importlib.util.find_spec("faiss") is None:
        yield Contender("faiss-cpu IndexFlatIP", None, note="not installed")
    else:
        yield Contender("faiss-cpu IndexFlatIP", _faiss(some, W), len(some))


def _chunked_readout(x: Tensor, W: Tensor) -> None:
    """64 rows at a time, as TransformerLens 4's logit_readout: logits, their normalizer, top k; here at both poles."""
    tau = math.sqrt(x.shape[1]) / x.norm(dim=1, keepdim=True)
    for part in (x * tau).split(64):
        logits = part @ W
        for pole in (logits, -logits):
            pole.logsumexp(-1)
            pole.topk(K)


def _faiss(x: Tensor, W: Tensor) -> Callable[[], object]:
    """An exact inner-product index, searched for both poles: tokens alone, no statistics. Building it is not timed."""
    import faiss  # pyright: ignore[reportMissingImports]

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(len(W))
    index.add(W.T.contiguous().numpy())
    both = torch.cat([x, -x]).numpy()
    return lambda: index.search(both, K)
