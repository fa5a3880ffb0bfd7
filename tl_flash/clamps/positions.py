"""Which positions of the sequence the pass in flight holds, with and without a KV cache."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from operator import index
from types import FrameType
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor

from tl_flash.clamps.sites import Hook

PositionName = Literal["prompt", "generated", "last"]
Positions = PositionName | int | Iterable[int] | None
_ENTRY = "blocks.0.hook_resid_pre"
# Hugging Face's names for attention whose cache forgets, and where the config says after how many positions.
_FORGETFUL = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def parse_positions(positions: Positions) -> PositionName | frozenset[int] | None:
    """Bring every accepted form of positions to a name, a set of indices, or None for all.

    Raises:
        TypeError: neither a name nor whole numbers.
        ValueError: an unknown name, no index at all, or a negative one.
    """
    if positions is None:
        return None
    if isinstance(positions, str):
        if positions not in get_args(PositionName):
            raise ValueError(f'positions: expected "prompt", "generated", "last", indices or None, got {positions!r}')
        return positions
    try:
        chosen = frozenset(map(_whole, positions if _has_many(positions) else [positions]))
    except TypeError:
        raise TypeError(f"positions: expected whole numbers, got {positions!r}") from None
    if not chosen:
        raise ValueError("positions: expected at least one index, got none; None means every position")
    if min(chosen) < 0:
        raise ValueError(
            f'positions: expected indices from 0, got {min(chosen)}; to follow the end of the text use "last"'
        )
    return chosen


def _has_many(positions: Any) -> TypeGuard[Iterable[Any]]:
    return isinstance(positions, Iterable) and getattr(positions, "ndim", 1) > 0


def _whole(number: Any) -> int:
    if isinstance(number, bool) or getattr(number, "dtype", None) == torch.bool:
        raise TypeError("a mask is not a list of indices")
    return index(number)


class Positioned:
    """Which columns of each forward pass hold the positions asked for.

    A hook sees columns alone: in a KV-cached step, column 0 may be position 37. Two hooks tell: the attention
    pattern's shape [..., query, key] says how many positions the cache holds, and what enters the first block whether
    an uncached pass repeats the previous one with one token more, which is what generation without a cache does.

    A pass that adds exactly one position to those before it generates; any other sets where the prompt ends.
    """

    def __init__(self, positions: PositionName | frozenset[int], layer: int, model: Any = None):
        """Follow the attention of `layer`; `model` tells whether its cache forgets."""
        self.name = f"blocks.{layer}.attn.hook_pattern"
        self.passes = 0
        self.start = 0
        """The position of column 0 in the last pass; `width` columns follow, `n_prompt` positions are the prompt."""
        self.width = 0
        self.n_prompt = 0
        self._positions: PositionName | frozenset[int] = positions
        self._knows_model = model is not None
        self._window = _cache_window(model, layer)
        self._entered: Tensor | None = None
        self._repeats: bool | None = None

    def hooks(self) -> list[tuple[str, Hook]]:
        """The (hook name, function) pairs that follow the sequence; they change nothing."""
        pattern = (self.name, self._see_pattern)
        # Not hook_embed: HookedTransformer.generate goes around it.
        return [(_ENTRY, self._see_entry), pattern] if isinstance(self._positions, str) else [pattern]

    def columns(self) -> list[int]:
        """The columns of the pass in flight that hold the positions asked for."""
        end = self.start + self.width
        if not isinstance(self._positions, str):
            return sorted(position - self.start for position in self._positions if self.start <= position < end)
        first, last = {
            "prompt": (0, self.n_prompt),
            "generated": (self.n_prompt, end),
            "last": (self.n_prompt - 1, end),
        }[self._positions]
        return list(range(max(first - self.start, 0), min(last, end) - self.start))

    def missed(self, reached: set[int]) -> str | None:
        """The positions asked for that are not among those reached, in words; None if there are none."""
        if isinstance(self._positions, str):
            return None if reached else f"positions={self._positions!r}"
        missed = sorted(self._positions - reached)
        return f"positions {missed}" if missed else None

    def _see_entry(self, residual: Tensor, hook: Any) -> Tensor:
        _refuse_mixed_passes(f"positions={self._positions!r}")
        previous, now = self._entered, residual.detach()
        self._repeats = (
            previous is not None
            and self.start == 0
            and now.shape == (*previous.shape[:-2], previous.shape[-2] + 1, previous.shape[-1])
            and torch.equal(now[..., :-1, :], previous)
        )
        self._entered = now.clone()  # a later hook may edit it in place
        return residual

    def _see_pattern(self, pattern: Tensor, hook: Any) -> Tensor:
        n_query, n_key = pattern.shape[-2:]
        if isinstance(self._positions, str) and self._repeats is None:
            raise RuntimeError(
                f"positions={self._positions!r}: this pass did not go through {_ENTRY} (it starts at a later "
                "layer?), so its prompt cannot be told from what was generated; give positions as indices"
            )
        if n_key > n_query and not pattern[..., -1].any():
            raise RuntimeError(
                f"positions: no query sees the last of {n_key} keys, so the cache is longer than the sequence (a "
                "static cache?) and tells no position; generate with a cache that grows, or clamp every position"
            )
        seen = self.start + self.width
        self.start, self.width = self._place(n_key - n_query, seen), n_query
        if isinstance(self._positions, str) and n_query > 1 and self.start == seen > 0:
            raise _mixed(f"positions={self._positions!r}", f"{n_query} positions came upon the {seen} before them")
        generates = self._repeats if self.start == 0 else n_query == 1
        if not generates:
            self.n_prompt = self.start + n_query
        elif self.start not in (0, seen):
            self.n_prompt = self.start  # one token upon a cache that was filled elsewhere
        self._repeats = None
        self.passes += 1
        return pattern

    def _place(self, n_cached: int, n_seen: int) -> int:
        """The position of column 0, where attention sees `n_cached` earlier ones and earlier passes had `n_seen`."""
        if n_cached in (0, n_seen):
            return n_cached
        full = self._window is not None and n_cached >= self._window - 1
        if full and n_seen > n_cached:
            return n_seen
        if full or not self._knows_model and n_cached < n_seen:
            raise RuntimeError(
                f"positions: attention sees {n_cached} cached positions where earlier passes had {n_seen}; that is "
                "either the cache of another sequence or a sliding window that dropped the oldest. "
                + ("Run the sequence from its start under the clamp" if full else "Pass model= to tell them apart")
            )
        return n_cached


def _mixed(what: str, seen: str) -> RuntimeError:
    return RuntimeError(
        f"{what}: {seen} (a prompt in chunks, or candidates of prompt lookup or an assistant), and nothing tells the "
        "prompt from what is generated; give the prompt in one pass and generate a token at a time, or give positions "
        "as indices"
    )


def _refuse_mixed_passes(what: str) -> None:
    """Refuse a pass of Hugging Face's assisted generation or chunked prefill, whose shapes are those of a prompt.

    Raises:
        RuntimeError: it is one.
    """
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_name
        if name == "_assisted_decoding" or (name == "_prefill" and _in_chunks(frame)):
            raise _mixed(what, f"transformers' {name} mixes both in a pass")
        frame = frame.f_back


def _in_chunks(frame: FrameType) -> bool:
    return getattr(frame.f_locals.get("generation_config"), "prefill_chunk_size", None) is not None


def _cache_window(model: Any, layer: int) -> int | None:
    """After how many positions the layer's KV cache forgets the oldest; None where it never does.

    HookedTransformer's never does; a bridge's cache is Hugging Face's.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    name = _FORGETFUL.get(kinds[layer]) if kinds else "sliding_window"
    return None if name is None else getattr(config, name, None)
