"""What a clamp of 1,000 neurons in one layer costs, beside a forward pass with a hook there that does nothing.

    python benchmarks/clamp_overhead.py

Both are timed in turns in one run, on a random Llama of 4 layers as a TransformerBridge, so the ratio of the medians
does not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

from tl_flash.clamps import clamp

LIMIT = 1.2
D_MODEL, D_MLP, N_LAYERS, D_VOCAB = 512, 2048, 4, 4096
LAYER = 2


def build() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    hf = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    hf.config.architectures = ["LlamaForCausalLM"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_letters(), bos_token="a", eos_token="b")
    tokenizer.init_kwargs.update(name_or_path="random", add_bos_token=True)
    return TransformerBridge.boot_transformers("random/llama", hf_model=hf, tokenizer=tokenizer, device="cpu")


def _letters() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abcd")}, merges=[]))


def milliseconds(model: Any, tokens: torch.Tensor, context: AbstractContextManager) -> float:
    with context:
        start = time.perf_counter()
        model(tokens)
        return 1e3 * (time.perf_counter() - start)


def compare(model: Any, tokens: torch.Tensor, repeats: int, options: dict[str, Any]) -> tuple[float, float]:
    """Median milliseconds of a pass with a no-op hook and of a clamped one."""
    neurons = {(LAYER, index): 0.5 for index in range(1000)}

    def no_op() -> AbstractContextManager:
        return model.hooks(fwd_hooks=[(f"blocks.{LAYER}.mlp.hook_post", lambda act, hook: None)])

    contexts: list[Callable[[], AbstractContextManager]] = [no_op, lambda: clamp(model, neurons, **options)]
    times: list[list[float]] = [[], []]
    for repeat in range(repeats + 3):
        for which in (0, 1) if repeat % 2 else (1, 0):
            spent = milliseconds(model, tokens, contexts[which]())
            if repeat >= 3:  # the first ones warm up
                times[which].append(spent)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model = build()
    print(f"{N_LAYERS} layers, d_model {D_MODEL}, d_mlp {D_MLP}, 1,000 neurons clamped in layer {LAYER},")
    print(f"{arguments.threads} threads, medians of {arguments.repeats} interleaved passes")
    worst = 0.0
    with torch.inference_mode():
        for batch, position in ((1, 16), (4, 64)):
            tokens = torch.randint(0, D_VOCAB, (batch, position), generator=torch.Generator().manual_seed(0))
            for options in ({}, {"mode": "add"}, {"positions": "last"}):
                no_op_ms, clamp_ms = compare(model, tokens, arguments.repeats, options)
                worst = max(worst, clamp_ms / no_op_ms)
                print(
                    f"batch {batch} x {position:3d} positions  {str(options or 'set everywhere'):24s} "
                    f"no-op hook {no_op_ms:7.2f} ms  clamp {clamp_ms:7.2f} ms  ratio {clamp_ms / no_op_ms:.3f}"
                )
    print(f"largest ratio {worst:.3f}, limit {LIMIT}")
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
