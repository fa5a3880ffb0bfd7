"""What a model writes after a prompt."""

from __future__ import annotations

from typing import Any

import torch

from tl_flash.clamps.caches import reads_its_cache
from tl_flash.clamps.prompts import Prompts
from tl_flash.weights import measuring


def complete_text(
    model: Any, prompt: Any, max_new_tokens: int = 24, *, chat: bool = False, do_sample: bool = False, seed: int = 0
) -> str:
    """What a model generates after one prompt, as `Prompts.of` takes it, without the prompt and special tokens.

    It generates with a KV cache where the model reads it (`reads_its_cache`), else without one.

    Raises:
        ValueError: the model has no tokenizer, or what `require_room` refuses.
    """
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("model: it has no tokenizer, so it cannot complete text")
    prompts = Prompts.of(model, [prompt], chat=chat)
    require_room(model, prompts, max_new_tokens)
    tokens = prompts.rows[0][None].to(model.W_U.device)
    with measuring(model), torch.random.fork_rng(devices=[]):
        cached = reads_its_cache(model)
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


def require_room(model: Any, prompts: Prompts, max_new_tokens: int) -> None:
    """Refuse completions that a model cannot write.

    Raises:
        ValueError: max_new_tokens is no whole number of 1 or more, or the longest prompt leaves no room for them.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected a whole number, 1 or more, got {max_new_tokens!r}")
    longest = max(map(len, prompts.rows))
    if longest + max_new_tokens - 1 > model.cfg.n_ctx:  # the last one is not read
        raise ValueError(
            f"max_new_tokens: expected a prompt and its completion within n_ctx = {model.cfg.n_ctx} tokens, got "
            f"{longest} and {max_new_tokens}; give shorter prompts, or ask for fewer"
        )
