"""What a model writes after a prompt."""

from __future__ import annotations

from typing import Any

import torch

from tl_flash.clamps.caches import reads_its_cache


def complete_text(model: Any, prompt: str, max_new_tokens: int = 24, *, do_sample: bool = False, seed: int = 0) -> str:
    """What a model generates after a prompt, without the prompt and special tokens.

    It generates with a KV cache where the model reads it (`reads_its_cache`), else without one.

    Raises:
        ValueError: the model has no tokenizer.
    """
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("model: it has no tokenizer, so it cannot complete text")
    tokens, cached = model.to_tokens(prompt), reads_its_cache(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            use_past_kv_cache=cached,
            verbose=False,
            return_type="tokens",
        )
    return model.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
