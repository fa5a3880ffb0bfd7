"""The explorer page of a map as large as Llama 3.1 8B's, in a real browser: its size, and how long it takes.

    python -m benchmarks.explorer [--neurons 458752]

The map is synthetic: top tokens drawn evenly from the vocabulary, which packs worse than those of a trained model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from tests.browser import chromium, opened, seconds_to_answer
from tl_flash import NeuronMap, report
from tl_flash.maps import Null, Source, TopTokens, Tracked
from tl_flash.vocab import Vocab

LAYERS, D_VOCAB, D_MODEL, K = 32, 128_256, 4096, 10


def synthetic_map(n_neurons: int, *, seed: int = 0) -> NeuronMap:
    """A map of that many neurons with Llama 3.1's vocabulary size, of random tokens and scores."""
    if n_neurons % LAYERS:
        raise ValueError(f"n_neurons: expected a multiple of {LAYERS} layers, got {n_neurons}")
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, n_neurons // LAYERS)
    vocab = Vocab(D_VOCAB, (" dog", " California", *(f" word{id}" for id in range(2, D_VOCAB))))
    std, norm = (0.5 + torch.rand(*shape, generator=generator) for _ in range(2))
    tau = D_MODEL**0.5 / norm

    def pole() -> TopTokens:
        z = 3.8 + torch.rand(*shape, K, generator=generator).log().mul(-0.25).sort(-1, descending=True).values
        return TopTokens(
            ids=torch.randint(D_VOCAB, (*shape, K), generator=generator, dtype=torch.int32),
            logits=z * std[..., None],
            log_z=torch.log(torch.tensor(float(D_VOCAB))) + (tau * std).square() / 2,
            write_z=torch.randn(*shape, K, generator=generator),
            std=std,
            tau=tau,
            vocab=vocab,
            score="dot",
        )

    null = torch.rand(LAYERS, 2048, generator=generator).log().mul(-0.2).add(4).sort(-1).values
    return NeuronMap(
        side="in",
        score="dot",
        n_layers=LAYERS,
        n_experts=None,
        layers=tuple(range(LAYERS)),
        d_model=D_MODEL,
        source=Source("synthetic", "none", "none", "float32", True, None, False, "exact", 0, {}),
        vocab=vocab,
        positive=pole(),
        negative=pole(),
        norm=norm,
        mean=torch.zeros(shape),
        std=std,
        kurtosis=torch.randn(*shape, generator=generator),
        null=Null(null, null[:, ::2] - 4),
        tracked=Tracked([], torch.empty(0, *shape), vocab),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=458_752)
    neurons = synthetic_map(parser.parse_args().neurons)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        start = time.perf_counter()
        page = report.write(neurons, Path(folder) / "page.html")
        seconds, size = time.perf_counter() - start, page.stat().st_size / 1e6
        print(f"{len(neurons):,} neurons: written in {seconds:.1f} s, {size:.1f} MB")
        start = time.perf_counter()
        opened(browser, page)
        print(f"opened in {time.perf_counter() - start:.2f} s")
        for query in (" dog", "word12", "L31", "L31N100", ""):
            print(f"{query!r:10} answered in {seconds_to_answer(browser, query):.3f} s")
        for order in ("prob", "kurtosis", "coherence"):
            print(f"sorted by {order} in {seconds_to_answer(browser, '', order):.3f} s")


if __name__ == "__main__":
    main()
