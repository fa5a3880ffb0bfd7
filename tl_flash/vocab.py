"""A vocabulary: token ids to display strings, strings to ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Split = Callable[[str], list[int]]
"""The tokens of a text, without special ones added."""
NO_TOKEN = "<none>"
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
    split: Split | None = field(default=None, compare=False, repr=False)
    """The tokenizer's pieces of a text, for error messages."""

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, d_vocab: int) -> Vocab:
        """Read the strings of a tokenizer.

        Args:
            tokenizer: of Hugging Face (transformers or tokenizers), tiktoken or SentencePiece; or the strings
                themselves: a list by id, a dict of id to string or of string to id. None gives a vocabulary without.
            d_vocab: tokens of the unembedding.

        Raises:
            TypeError: a tokenizer of another kind.
            ValueError: ids that are no whole numbers from 0, or two strings for one.
        """
        if tokenizer is None:
            return cls(d_vocab)
        strings, split = _read_tokenizer(tokenizer)
        known = {id: string for id, string in strings.items() if id < d_vocab}
        return cls(d_vocab, tuple(known.get(id) for id in range(max(known, default=-1) + 1)), split=split)

    @classmethod
    def of_model(cls, model: Any, d_vocab: int, tokenizer: Any = None) -> Vocab:
        """The vocabulary of a model's unembedding, named by a tokenizer, by default the model's own.

        A model that answers with classes of its own (`cfg.d_vocab_out` other than `cfg.d_vocab`, as in modular
        addition) does not name them by the tokens that it reads.
        """
        if tokenizer is None and writes_what_it_reads(model):
            tokenizer = getattr(model, "tokenizer", None)
        return cls.of_tokenizer(tokenizer, d_vocab)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle keeps: as a map's file, the strings, and no tokenizer."""
        return {"d_vocab": self.d_vocab, "strings": self.strings, "split": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Vocab:
        return self  # nothing in it changes

    @cached_property
    def names(self) -> np.ndarray:
        """Display strings by id, an object array [d_vocab + 1]; the last is that of id -1, which is no token."""
        return np.array([self.string(id) for id in (*range(self.d_vocab), -1)], dtype=object)

    def string(self, id: int) -> str:
        """The display string of an id; of -1, the id that a zero direction has, "<none>"."""
        if id < 0:
            return NO_TOKEN
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
        if isinstance(tokens, str) or not isinstance(tokens, Iterable):
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


def writes_what_it_reads(model: Any) -> bool:
    """Whether a model predicts the tokens that it reads, and not classes of its own."""
    cfg = getattr(model, "cfg", None)
    return getattr(cfg, "d_vocab_out", None) in (None, -1, getattr(cfg, "d_vocab", None))


def _read_tokenizer(tokenizer: Any) -> tuple[dict[int, str], Split | None]:
    """The display string of each id, and how the tokenizer splits a text, where it can."""
    if isinstance(tokenizer, Mapping | Sequence) and not isinstance(tokenizer, str | bytes):
        return _of_table(tokenizer), None
    given: Any = tokenizer
    if hasattr(given, "get_vocab") and hasattr(given, "batch_decode"):
        return _of_transformers(given), lambda text: given.encode(text, add_special_tokens=False)
    if hasattr(given, "get_vocab") and hasattr(given, "decode_batch"):
        return _of_tokenizers(given), lambda text: given.encode(text, add_special_tokens=False).ids
    if hasattr(given, "n_vocab") and hasattr(given, "decode"):
        return _of_tiktoken(given), given.encode
    if hasattr(given, "id_to_piece") and hasattr(given, "get_piece_size"):
        return _of_sentencepiece(given), given.encode
    raise TypeError(
        f"tokenizer: {type(tokenizer).__name__} is of no known kind; expected one of transformers, tokenizers, "
        "tiktoken or sentencepiece, or its strings: a list by id, or a dict"
    )


def _of_table(table: Mapping[Any, Any] | Sequence[Any]) -> dict[int, str]:
    pairs = list(table.items() if isinstance(table, Mapping) else enumerate(table))
    if pairs and isinstance(pairs[0][0], str):
        pairs = [(id, string) for string, id in pairs]
    for id, string in pairs:
        if isinstance(id, bool) or not hasattr(id, "__index__") or id < 0 or not isinstance(string, str):
            raise ValueError(f"tokenizer: expected strings with ids from 0, got {string!r} with {id!r}")
    strings = {int(id): string for id, string in pairs}
    if len(strings) < len(pairs):
        raise ValueError(f"tokenizer: expected one string for each id, got {len(pairs)} strings for {len(strings)} ids")
    return strings


def _of_transformers(tokenizer: Any) -> dict[int, str]:
    raw = {id: token for token, id in tokenizer.get_vocab().items()}
    decoded = tokenizer.batch_decode([[id] for id in raw], clean_up_tokenization_spaces=False)
    return {id: _display(raw[id], text) for id, text in zip(raw, decoded, strict=True)}


def _of_tokenizers(tokenizer: Any) -> dict[int, str]:
    raw = {id: token for token, id in tokenizer.get_vocab().items()}
    decoded = tokenizer.decode_batch([[id] for id in raw], skip_special_tokens=False)
    return {id: _display(raw[id], text) for id, text in zip(raw, decoded, strict=True)}


def _of_tiktoken(tokenizer: Any) -> dict[int, str]:
    strings = {}
    for id in range(tokenizer.n_vocab):
        try:
            strings[id] = tokenizer.decode([id])
        except KeyError:  # tiktoken's vocabularies have holes before the special tokens
            continue
    return strings


def _of_sentencepiece(tokenizer: Any) -> dict[int, str]:
    pieces = ((id, tokenizer.id_to_piece(id)) for id in range(tokenizer.get_piece_size()))
    return {id: piece if _BYTE.fullmatch(piece) else piece.replace("▁", " ") for id, piece in pieces}


def _display(raw: str, decoded: str) -> str:
    if _BYTE.fullmatch(raw):
        return raw
    spaces = len(raw) - len(raw.lstrip("▁"))
    return " " * spaces + decoded.lstrip(" ") if spaces else decoded
