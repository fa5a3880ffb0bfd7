"""Whether a model reads the KV cache that it generates with: with some versions of its libraries it does not."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tl_flash.clamps.sites import attached

_PROBED = 4
"""Tokens of the prompt that it is asked with."""
_ALIKE = 0.1
"""Of the length of the residual stream: rounding moves it by far less, a forgotten prompt by far more."""

_answers: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def reads_its_cache(model: Any) -> bool:
    """Whether a second generated token sees what the first one saw; asked once a model.

    What the last block writes for it is compared with and without the cache. A bridge whose attention does not take the
    cache that its library hands it generates text in which every token sees itself alone.

    Args:
        model: a HookedTransformer or a TransformerBridge.

    Example:
        >>> from tl_flash.clamps import reads_its_cache
        >>> reads_its_cache(model)
        True
    """
    if model not in _answers:
        tokens = torch.arange(_PROBED, device=model.W_U.device)[None] % model.W_U.shape[1]
        cached, whole = (_second_token(model, tokens, use_cache) for use_cache in (True, False))
        _answers[model] = bool((cached - whole).norm() <= _ALIKE * whole.norm())
    return _answers[model]


def _second_token(model: Any, tokens: Tensor, use_cache: bool) -> Tensor:
    """The residual stream after the last block at the first generated token, float32 [d_model]."""
    seen: list[Tensor] = []

    def see(residual: Tensor, hook: Any) -> Tensor:
        seen.append(residual[0, -1].detach().float())
        return residual

    last = f"blocks.{len(model.blocks) - 1}.hook_resid_post"
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    with torch.no_grad(), attached(model, [(last, see)]):
        model.generate(tokens, max_new_tokens=2, use_past_kv_cache=use_cache, **options)
    return seen[1]
