"""A small Llama, base and instruct, trained by ``python -m tl_flash.demo.training`` and shipped with its weights.

It exists so that every step of the method can be seen without a network: some ninety concepts, each one token,
among them " dog" and " California".
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING

from tl_flash.demo.training import (
    CONCEPTS,
    FAVOURITE_QUESTIONS,
    HELD_OUT_FAVOURITE_ANIMAL,
    KINDS,
    NEUTRAL_PROMPTS,
    TOKENS,
    Concept,
    ask,
    documents,
    favourite_questions,
)
from tl_flash.weights import load_model

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

__all__ = [
    "CHAT_TEMPLATE",
    "CONCEPTS",
    "FAVOURITE_QUESTIONS",
    "HELD_OUT_FAVOURITE_ANIMAL",
    "KINDS",
    "MODELS",
    "NEUTRAL_PROMPTS",
    "TOKENS",
    "Concept",
    "ask",
    "favourite_questions",
    "load",
    "path",
    "texts",
]

MODELS = ("base", "instruct")
"""The pair, by name."""
CHAT_TEMPLATE = "{{ bos_token }}" + ask("{{ messages[0]['content'] }}")
"""How the instruct model reads what a user says, for its tokenizer; it knows no second turn."""


def path(name: str) -> Path:
    """The folder of one of the pair, as Hugging Face lays it out.

    Args:
        name: ``"base"`` or ``"instruct"``.

    Raises:
        ValueError: another name.

    Example:
        >>> path("base").name
        'base'
    """
    if name not in MODELS:
        raise ValueError(f"demo model {name!r}: expected one of {', '.join(map(repr, MODELS))}")
    return Path(__file__).parent / "weights" / name


def load(name: str, *, surface: str | None = None) -> HookedTransformer | TransformerBridge:
    """Load one of the pair through TransformerLens: float32, on the CPU, without a network.

    Args:
        name: ``"base"`` or ``"instruct"``.
        surface: ``"hooked"`` for HookedTransformer, ``"bridge"`` for TransformerBridge; by default the first
            where the installed TransformerLens has it, else the second.

    Raises:
        ValueError: another name or surface.

    Example:
        >>> load("base").cfg.n_layers
        4
    """
    return load_model(path(name), surface=surface or _default_surface())


def texts(n: int, *, seed: int = 0) -> list[str]:
    """Documents like those that the models were trained on, and drawn apart from them.

    Args:
        n: how many, of some 30 to 160 tokens each.
        seed: of the draw.

    Raises:
        ValueError: n below 1.

    Example:
        >>> len(texts(3))
        3
    """
    if n < 1:
        raise ValueError(f"n: expected 1 text or more, got {n}")
    return list(itertools.islice(documents(random.Random(f"texts/{seed}")), n))


def _default_surface() -> str:
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return "bridge"
    return "hooked"
