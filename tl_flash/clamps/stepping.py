"""A sequence given to a model piece by piece, under hooks of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, cat

from tl_flash.clamps.caches import reads_its_cache
from tl_flash.clamps.sites import Hook, attached
from tl_flash.weights import measuring


class Stepper:
    """One sequence, read a piece at a time: several may take turns on one model, each under its own hooks.

    The hooks are attached while a piece is read and at no other time, so that what they know of the sequence (as the
    `positions` of `clamp_hooks` do) lasts as long as the stepper. Earlier pieces are in a KV cache where the model
    reads it (`reads_its_cache`), else they are read again with each new one.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        hooks: as `clamp_hooks` gives them.

    Example:
        >>> from tl_flash.clamps import Stepper
        >>> tokens = model.to_tokens("the dog")[0]
        >>> stepper = Stepper(model)
        >>> stepper.read(tokens).shape == (len(tokens), model.W_U.shape[1])
        True
        >>> stepper.read(tokens[:1]).shape == (1, model.W_U.shape[1])
        True
    """

    def __init__(self, model: Any, hooks: Sequence[tuple[str, Hook]] = ()) -> None:
        self._model, self._hooks = model, list(hooks)
        self._cached = reads_its_cache(model)
        self._cache: Any = None
        self._seen: Tensor | None = None

    def read(self, tokens: Int[Tensor, " position"]) -> Float[Tensor, "position d_vocab"]:
        """Append tokens to the sequence: the logits at each of them, float32 on the CPU.

        Raises:
            RuntimeError: what the hooks refuse.
        """
        tokens = tokens.to(self._model.W_U.device)
        with measuring(self._model), attached(self._model, self._hooks):
            logits = self._pass(tokens[None])
        return logits[0, -len(tokens) :].float().cpu()

    def _pass(self, tokens: Int[Tensor, "1 position"]) -> Tensor:
        if not self._cached:
            self._seen = tokens if self._seen is None else cat([self._seen, tokens], dim=1)
            return self._model(self._seen)
        if hasattr(self._model, "original_model"):
            logits, self._cache = self._model(
                tokens, return_type="logits_and_cache", use_cache=True, past_key_values=self._cache
            )
            return logits
        if self._cache is None:
            self._cache = _key_value_cache(self._model)
        return self._model(tokens, past_kv_cache=self._cache)


def _key_value_cache(model: Any) -> Any:
    """HookedTransformer's, which changed its name in TransformerLens 3."""
    import transformer_lens

    names = ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache")
    (kind, *_) = (getattr(transformer_lens, name) for name in names if hasattr(transformer_lens, name))
    return kind.init_cache(model.cfg, model.W_U.device, 1)
