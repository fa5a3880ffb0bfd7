"""What is timed: the engine, the bare matrix products under it, and other ways to read directions out."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_flash.kernel import decode, prepare, reference_decode
from tl_flash.kernel.unembedding import multiplies_bf16_faster, parts, plain_arithmetic

K = 10


@dataclass(frozen=True)
class Shape:
    """A model's neurons and its unembedding."""

    name: str
    n_neurons: int
    d_model: int
    d_vocab: int
    dtype: torch.dtype

    def draw(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random directions [rows, d_model], and W_U held [d_vocab, d_model] as lm_head.weight is, then transposed."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(n: int) -> Tensor:
            drawn = torch.empty(n, self.d_model, dtype=self.dtype, device=device)
            for part in parts(n, 4096):
                drawn[part] = torch.randn(drawn[part].shape, generator=generator, device=device) / math.sqrt(
                    self.d_model
                )
            return drawn

        return normal(rows), normal(self.d_vocab).T


SHAPES = [
    Shape("GPT-2 small", 12 * 3072, 768, 50257, torch.float32),
    Shape("Llama-3.2-1B", 16 * 8192, 2048, 128256, torch.bfloat16),
    Shape("Llama-3.1-8B", 32 * 14336, 4096, 128256, torch.bfloat16),
]

Contender = Callable[[], object]


def contenders(x: Tensor, W_U: Tensor) -> Iterator[tuple[str, Contender | str]]:
    """(name, what to time, or the reason why not). All give or underlie the top K tokens of every direction.

    The plain definition, the chunked readout and faiss get W_U in float32, converted before the clock starts.
    """
    unembedding, unproven, W = prepare(W_U), prepare(W_U, precision="fast"), W_U.float()
    rows = 8192 if x.is_cuda else 256
    yield "tl_flash: prepare", lambda: prepare(W_U)
    yield "tl_flash: decode", lambda: decode(x, unembedding, k=K)
    yield "tl_flash: decode, fast", lambda: decode(x, unproven, k=K)
    yield "GEMM float32", lambda: _products(x.float(), W, rows)
    if multiplies_bf16_faster(x.device):
        low = W_U.bfloat16()
        yield "GEMM bf16", lambda: _products(x.bfloat16(), low, rows)
    else:
        yield "GEMM bf16", "slower than float32 on this device"
    yield "plain definition", lambda: [reference_decode(x[part], W, k=K) for part in parts(len(x), rows // 2)]
    yield "64-row readout", lambda: _chunked_readout(x.float(), W)
    if x.is_cuda:
        yield "faiss-cpu IndexFlatIP", "not on a GPU"
    elif importlib.util.find_spec("faiss") is None:
        yield "faiss-cpu IndexFlatIP", "not installed"
    else:
        yield "faiss-cpu IndexFlatIP", _faiss(x.float(), W)


def _products(x: Tensor, W: Tensor, rows: int) -> None:
    """The floor: nothing but the matrix product, into a buffer that is used again."""
    scores = torch.empty(min(rows, len(x)), W.shape[1], dtype=x.dtype, device=x.device)
    with plain_arithmetic(x.device):
        for part in parts(len(x), rows):
            torch.mm(x[part], W, out=scores[: part.stop - part.start])


def _chunked_readout(x: Tensor, W: Tensor) -> None:
    """64 rows at a time, as TransformerLens 4's logit_readout: logits, their normalizer, top k; here at both poles."""
    tau = math.sqrt(x.shape[1]) / x.norm(dim=1, keepdim=True)
    for part in (x * tau).split(64):
        logits = part @ W
        for pole in (logits, -logits):
            pole.logsumexp(-1)
            pole.topk(K)


def _faiss(x: Tensor, W: Tensor) -> Contender:
    """An exact inner-product index, searched for both poles: tokens alone, no statistics. Building it is not timed."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(len(W))
    index.add(W.T.contiguous().numpy())
    both = torch.cat([x, -x]).numpy()
    return lambda: index.search(both, K)
