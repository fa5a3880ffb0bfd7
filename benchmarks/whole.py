"""Time flash_decode of a whole model beside the matrix product of its neurons: python -m benchmarks.whole [gpt-2].

SmolLM2-135M (`make models`), random weights of GPT-2 small's shape as a HookedTransformer, and on a GPU random weights
of Llama 3.1 8B's shape as a Hugging Face model: from the model to its map in memory, null, write check and fingerprint
included, nothing kept from before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.__main__ import RESULTS
from benchmarks.measure import asked_device, device_name, stem
from benchmarks.real_models import SMOLLM2
from tl_flash import flash_decode, load_model
from tl_flash.bench import interleaved, products
from tl_flash.kernel import fast_dtype, forget
from tl_flash.weights import read


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print and file the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole", description=__doc__)
    makers = {"smollm2": smollm2, "gpt-2": gpt2_shaped, "llama-3.1-8b": llama_shaped}
    parser.add_argument("models", nargs="*", default=["smollm2", "gpt-2"], help=f"of {', '.join(makers)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, of which the median is told")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    device = asked_device(parser, args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    if unknown := set(args.models) - set(makers):
        parser.error(f"models: expected of {', '.join(makers)}, got {', '.join(unknown)}")
    found = pd.DataFrame([{"model": name} | race(makers[name](device), args.rounds, device) for name in args.models])
    print(found.to_string(index=False))
    found.to_csv(args.output / f"whole-{stem(device_name(device))}.csv", index=False)


def smollm2(device: torch.device) -> Any:
    """Trained weights."""
    return load_model(str(SMOLLM2.folder), surface="bridge").to(device)


def llama_shaped(device: torch.device) -> Any:
    """Random weights in bf16: 16 GB."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def gpt2_shaped(device: torch.device) -> Any:
    """Random weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=12,
        d_model=768,
        d_head=64,
        n_heads=12,
        n_ctx=64,
        d_vocab=50257,
        act_fn="gelu_new",
        seed=0,
        device=str(device),
    )
    return HookedTransformer(config)


def race(model: Any, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of the decode and of the product alone: on a CPU in float32, and in what is faster."""
    weights = read(model)
    low = fast_dtype(device)
    rows = torch.cat([weights.directions(layer, "in") for layer in range(weights.n_layers)])

    def decode() -> None:
        forget()
        flash_decode(model, progress=False)

    runs: dict[str, Callable[[], object]] = {"flash_decode": decode}
    for dtype in [torch.float32] * (device.type == "cpu") + [low] * (low is not None):
        runs[f"product, {str(dtype).removeprefix('torch.')}"] = partial(products, rows.to(dtype), weights.W_U.to(dtype))
    decode()  # kernels are compiled, memory is there
    took = {name: statistics.median(seconds) for name, seconds in interleaved(runs, rounds, device).items()}
    floor = min(seconds for name, seconds in took.items() if name.startswith("product"))
    rounded = {name: round(seconds, 2) for name, seconds in took.items()}
    return {"neurons": len(rows)} | rounded | {"of_floor": round(took["flash_decode"] / floor, 2)}


if __name__ == "__main__":
    main()
