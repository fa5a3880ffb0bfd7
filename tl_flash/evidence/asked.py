"""The tokens that a user asks about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tl_flash.vocab import Vocab


def asked_tokens(model: Any, tokens: Sequence[str | int]) -> dict[int, str]:
    """The ids of the tokens that a model may answer with, in the order given, and their strings.

    Raises:
        TypeError: no list of strings or ids.
        ValueError: none, or an unknown one.
    """
    vocab = Vocab.of_model(model, model.W_U.shape[1])
    ids = vocab.ids(tokens)
    if not ids:
        raise ValueError("tokens: expected at least one token, got none")
    return {id: vocab.string(id) for id in ids}
