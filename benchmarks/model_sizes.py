"""What a decode straight from a checkpoint reads and needs, computed from the sizes of published models.

    python -m benchmarks.model_sizes

Nothing is measured here. Read: W_U (a tied one once) and, for side "in", W_in and W_out of every layer, and W_gate
where it takes turns with W_in (gpt-oss). Memory: W_U, scratch as large again (at least 256 MiB), the covariance of W_U
in float64, eight blocks of 4,096 directions in float32, two more of what is unpacked, and the results twice (k = 10:
ids, logits and write_z of two poles, and six figures a neuron). Time: the products alone at 790 TFLOP/s, what an H100's
bf16 products reach, and reading at 3 GB/s; how long unpacking takes, `benchmarks.unpacking` measures.
"""

from __future__ import annotations

from typing import NamedTuple

FLOPS, READ = 790e12, 3e9
K = 10


class Model(NamedTuple):
    name: str
    n_layers: int
    d_model: int
    d_mlp: int
    d_vocab: int
    n_experts: int = 1
    bytes: int = 2
    packed: float | None = None
    """Bytes a number of the MLPs' matrices, where they are quantised."""
    matrices: int = 2


MODELS = (
    Model("GPT-2 (fp32)", 12, 768, 3072, 50257, bytes=4),
    Model("Llama 3.1 8B", 32, 4096, 14336, 128256),
    Model("Llama 3.1 70B", 80, 8192, 28672, 128256),
    Model("Llama 3.1 405B", 126, 16384, 53248, 128256),
    Model("Mixtral 8x7B", 32, 4096, 14336, 32000, n_experts=8),
    Model("Qwen3-30B-A3B", 48, 2048, 768, 151936, n_experts=128),
    Model("Llama 3.1 8B, GPTQ int4", 32, 4096, 14336, 128256, packed=(4 + (16 + 4) / 128) / 8),
    Model("gpt-oss-120b, MXFP4", 36, 2880, 2880, 201088, n_experts=128, packed=17 / 32, matrices=3),
    Model("DeepSeek V3, FP8, layers 3-60", 58, 7168, 2048, 129280, n_experts=257, packed=1 + 4 / 128**2),
)


def row(m: Model) -> str:
    neurons = m.n_layers * m.d_mlp * m.n_experts
    unembedding = m.d_model * m.d_vocab * m.bytes
    read = unembedding + m.matrices * neurons * m.d_model * (m.packed or m.bytes)
    blocks = 8 if m.packed is None else 10
    results = 2 * neurons * (2 * K * 3 + 6) * 4
    memory = unembedding + max(unembedding, 2**28) + 8 * m.d_model**2 + blocks * 4096 * m.d_model * 4 + results
    products = 2 * neurons * m.d_model * m.d_vocab / FLOPS
    cells = f"{short(read / 1e9)} GB", f"{short(memory / 1e9)} GB", f"{short(products)} s", f"{short(read / READ)} s"
    return f"| {m.name} | {neurons:,} | {' | '.join(cells)} |"


def short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def main() -> None:
    print("| model | neurons | read | memory | products | reading |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(map(row, MODELS)))


if __name__ == "__main__":
    main()
