"""A vocabulary: token ids to display strings, strings to ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's fallback for bytes that no token holds


@dataclass(frozen=True)
class Vocab:
    """What the ids of an unembedding are called.

    Strings keep the space that a token begins with, also where a SentencePiece tokenizer's own ``decode`` drops
    it: ``" he"`` and ``"he"`` are two tokens. A model without a tokenizer has no strings: its tokens print as
    ``<17>`` and are asked for by id.
    """

    d_vocab: int
    strings: tuple[str | None, ...] = field(default=(), repr=False)
    """One per id of the tokenizer, None where an id is no token; empty without a tokenizer."""
    split: Callable[[str], list[int]] | None = field(default=None, compare=False, repr=False)
    """The tokenizer's pieces of a text, for error messages."""

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, d_vocab: int) -> Vocab:
        """Read the strings of a Hugging Face tokenizer; of None, a vocabulary without strings."""
        if tokenizer is None:
            return cls(d_vocab)
        raw = {id: token for token, id in tokenizer.get_vocab().items() if id < d_vocab}
        ids = sorted(raw)
        decoded = tokenizer.batch_decode([[id] for id in ids], clean_up_tokenization_spaces=False)
        strings: list[str | None] = [None] * (ids[-1] + 1 if ids else 0)
        for id, text in zip(ids, decoded, strict=True):
            strings[id] = _display(raw[id], text)
        return cls(d_vocab, tuple(strings), split=lambda text: tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def names(self) -> np.ndarray:
        """Display strings by id, an object array [d_vocab]."""
        return np.array([self.string(id) for id in range(self.d_vocab)], dtype=object)

    def string(self, id: int) -> str:
        """The display string of an id."""
        string = self.strings[id] if id < len(self.strings) else None
        return f"<{id}>" if string is None else string

    def id(self, token: str | int) -> int:
        """The id of a token given by its exact string, leading space included, or by id.

        Raises:
            TypeError: the token is neither a string nor a whole number.
            ValueError: the id is out of range, or the string is no single token (the message shows its pieces) or
                the string of several.
        """
        if isinstance(token, str):
            return self._id_of_string(token)
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"token {token!r}: expected a string or an id, got {type(token).__name__}")
        id = int(token)
        if not 0 <= id < self.d_vocab:
            raise ValueError(f"token {id}: expected an id from 0 to {self.d_vocab - 1} (d_vocab {self.d_vocab})")
        return id

    def ids(self, tokens: Sequence[str | int]) -> list[int]:
        """The ids of several tokens; see `id`."""
        if isinstance(tokens, str):
            raise TypeError(f"tokens {tokens!r}: expected a list of strings or ids, such as [{tokens!r}]")
        return [self.id(token) for token in tokens]

    def nameless(self) -> list[int]:
        """Ids that are no token of the tokenizer (a padded unembedding): never to be reported."""
        if not self.strings:
            return []
        holes = [id for id, string in enumerate(self.strings) if string is None]
        return holes + list(range(len(self.strings), self.d_vocab))

    @cached_property
    def _ids_by_string(self) -> dict[str, list[int]]:
        ids: dict[str, list[int]] = {}
        for id, string in enumerate(self.strings):
            if string is not None:
                ids.setdefault(string, []).append(id)
        return ids

    def _id_of_string(self, token: str) -> int:
        ids = self._ids_by_string.get(token, [])
        if len(ids) == 1:
            return ids[0]
        if not self.strings:
            raise ValueError(f"token {token!r}: this model has no tokenizer; give the token's id")
        pieces = self.split(token) if self.split is not None else []
        if len(ids) > 1:
            if len(pieces) == 1 and pieces[0] in ids:
                return pieces[0]
            raise ValueError(f"token {token!r}: {len(ids)} tokens print so, ids {ids[:10]}; give the id")
        raise ValueError(f"token {token!r}: expected one token of the vocabulary{self._hint(token, pieces)}")

    def _hint(self, token: str, pieces: list[int]) -> str:
        hint = ""
        if len(pieces) > 1:
            hint = f", but it is {len(pieces)}: {[self.string(id) for id in pieces]}"
        near = [other for other in (" " + token.lstrip(), token.lstrip()) if other in self._ids_by_string]
        return hint + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")


def _display(raw: str, decoded: str) -> str:
    if _BYTE.fullmatch(raw):
        return raw
    spaces = len(raw) - len(raw.lstrip("▁"))
    return " " * spaces + decoded.lstrip(" ") if spaces else decoded
