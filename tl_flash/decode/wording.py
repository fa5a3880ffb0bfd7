"""The tokens that stand for a word, by what a vocabulary holds, each with a weight."""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache

from tl_flash.vocab import Vocab

WHOLE, VERBAL, PIECE = 1.0, 0.5, 0.5
"""Weights: of the word itself and its plural; of its forms as a verb; of a first piece, times the share of the word's
letters that it spells."""
LEAST = 0.25
"""The share of a word that a first piece has to spell: " h" says nothing of hippopotamuses."""
LIGHTEST = 1e-6
"""A token's least weight beside the heaviest: a lighter one would be lost in rounding."""
_VOWELS = "aeiou"
_HISSING = ("s", "x", "z", "ch", "sh")

TokenSet = dict[int, float]
"""Weights by token id."""


def tokens_of(vocab: Vocab, concept: str | Sequence[str]) -> TokenSet:
    """The tokens of a concept: of a word, of each word of a phrase or a list, and of a phrase that is one token.

    A word stands for every token that spells it, whatever the case and the width of its letters, with a leading space
    or without; an English word also for its plural and possessive, and with less weight for its forms as a verb. None
    of these is made up: the vocabulary holds them. A word that is several tokens in all its spellings stands for the
    first piece of each that spells a quarter of its letters or more, by their share. Several words count alike,
    however many tokens each has.

    Args:
        vocab: what the ids of the unembedding are called.
        concept: a word, a phrase, or several.

    Raises:
        TypeError: neither text nor a list of texts.
        ValueError: nothing but spaces, a model without a tokenizer, or a word that no token spells, nor its beginning.

    Example:
        >>> vocab = Vocab(5, (" dog", "Dogs", "cat", " DOG", "doge"))
        >>> tokens_of(vocab, "dog")
        {0: 1.0, 1: 1.0, 3: 1.0}
    """
    phrases = phrases_of(concept)
    said = reprlib.repr(concept)
    if not vocab.strings:
        raise ValueError(
            f"concept {said}: this model has no tokenizer to spell it; give tokenizer=, or tokens= by their ids"
        )
    sets = []
    for word, found in (pair for phrase in phrases for pair in _of_phrase(vocab, phrase)):
        if not found:
            pieces = [vocab.string(id) for id in vocab.split(word)] if vocab.split else []
            cut = f" (it is cut into {reprlib.repr(pieces)})" if pieces else ""
            raise ValueError(
                f"concept {said}: no token spells {reprlib.repr(word)}, nor the first quarter of it{cut}; leave it "
                "out, or give tokens= by hand"
            )
        sets.append(found)
    return dict(sorted((_alike(sets) if len(sets) > 1 else sets[0]).items()))


def phrases_of(concept: str | Sequence[str]) -> Sequence[str]:
    """What a concept is said by.

    Raises:
        TypeError: neither text nor a list of texts.
        ValueError: nothing but spaces.
    """
    phrases = [concept] if isinstance(concept, str) else list(concept) if isinstance(concept, Sequence) else [concept]
    if not all(isinstance(phrase, str) for phrase in phrases):
        raise TypeError(f"concept: expected a word, a phrase or a list of them, got {reprlib.repr(concept)}")
    if not phrases or not all(phrase.strip() for phrase in phrases):
        raise ValueError(f"concept: expected a word such as 'dog', got {reprlib.repr(concept)}, which says nothing")
    return phrases


def given_tokens(vocab: Vocab, tokens: Mapping[str | int, float] | Sequence[str | int]) -> TokenSet:
    """Tokens given by hand, by their exact strings or ids: a list, or a mapping to weights as results show it.

    Raises:
        TypeError: one string, or a token or weight of another kind.
        ValueError: none, one that does not exist or that comes twice, or a weight that is not positive and finite, or
            that is lost beside another.
    """
    if not isinstance(tokens, Mapping):
        tokens = dict.fromkeys(vocab.ids(tokens), WHOLE)
    if not tokens:
        raise ValueError("tokens: expected at least one token, got none")
    found: TokenSet = {}
    for token, weight in tokens.items():
        id = vocab.id(token)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"tokens: expected a number as the weight of {token!r}, got {type(weight).__name__}")
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"tokens: expected a positive weight of {token!r}, got {weight}; leave it out instead of 0"
            )
        if id in found:
            raise ValueError(f"tokens: {vocab.string(id)!r} (id {id}) is given twice; give it one weight")
        found[id] = float(weight)
    largest = max(found.values())
    if min(found.values()) < LIGHTEST * largest:
        raise ValueError(
            f"tokens: expected weights of at least {LIGHTEST:g} of the heaviest, got {min(found.values())} beside "
            f"{largest}; leave that token out"
        )
    return found if 1 / LIGHTEST > largest > LIGHTEST else {id: weight / largest for id, weight in found.items()}


def shown(vocab: Vocab, tokens: TokenSet) -> dict[str | int, float]:
    """Weights by token as `given_tokens` takes them, the heaviest first: by string where that names the token alone."""

    def name(id: int) -> str | int:
        string = vocab.string(id)
        try:
            return string if vocab.id(string) == id else id
        except ValueError:
            return id

    return {name(id): weight for id, weight in sorted(tokens.items(), key=lambda pair: -pair[1])}


def spells_same(vocab: Vocab, a: int, b: int) -> bool:
    """Whether two tokens differ in case, width and spaces alone."""
    return _folded(vocab.string(a)) == _folded(vocab.string(b))


def _of_phrase(vocab: Vocab, phrase: str) -> list[tuple[str, TokenSet]]:
    """Each word and its set, the last one inflected; of a phrase that is one token that alone."""
    *others, last = phrase.split()
    whole = _spelled(vocab).get(_folded(phrase)) if others else None
    if whole:
        return [(phrase, dict.fromkeys(whole, WHOLE))]
    return [*((word, _of_word(vocab, word, inflect=False)) for word in others), (last, _of_word(vocab, last))]


def _alike(sets: Sequence[TokenSet]) -> TokenSet:
    """All of several sets, which count alike; the heaviest token's weight is 1."""
    joined: TokenSet = {}
    for each in sets:
        joined = _joined(joined, {id: weight / sum(each.values()) for id, weight in each.items()})
    return {id: round(weight / max(joined.values()), 3) for id, weight in joined.items()}


def _joined(a: TokenSet, b: TokenSet) -> TokenSet:
    """Both sets; of a token's two weights the larger."""
    return {id: max(a.get(id, 0.0), b.get(id, 0.0)) for id in (*a, *b)}


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip().casefold()


@lru_cache(maxsize=4)
def _spelled(vocab: Vocab) -> dict[str, tuple[int, ...]]:
    """Ids by what their tokens spell, case, width and spaces aside."""
    ids: dict[str, list[int]] = {}
    for id, string in enumerate(vocab.strings):
        if string is not None:
            ids.setdefault(_folded(string), []).append(id)
    return {spelled: tuple(each) for spelled, each in ids.items() if spelled}


def _of_word(vocab: Vocab, word: str, inflect: bool = True) -> TokenSet:
    spelled, bare = _spelled(vocab), _folded(word)
    nouns, verbs = (_noun_forms(bare), _verb_forms(bare)) if inflect else ([], [])
    found: TokenSet = {}
    for weight, forms in ((WHOLE, [bare, *nouns]), (VERBAL, verbs)):
        for form in forms:
            found = _joined(found, dict.fromkeys(spelled.get(form, ()), weight))
    return found if bare in spelled else _joined(found, _first_pieces(vocab, word))


def _first_pieces(vocab: Vocab, word: str) -> TokenSet:
    """The first piece of each spelling of a word, where the piece spells a beginning of it."""
    if vocab.split is None:
        return {}
    found: TokenSet = {}
    for spelling in dict.fromkeys((f" {word}", word, f" {word.capitalize()}", word.capitalize())):
        for id in vocab.split(spelling):
            piece = _folded(vocab.string(id))
            if not piece:
                continue  # the space alone: what comes after it is the word's first piece
            share = len(piece) / len(_folded(word)) if _folded(word).startswith(piece) else 0.0
            if share >= LEAST:
                found[id] = round(PIECE * share, 3)
            break
    return found


def _noun_forms(word: str) -> list[str]:
    """English plural and possessive; of other words none."""
    if not (word.isascii() and word.isalpha()):
        return []
    if word.endswith("y") and word[-2:-1] not in _VOWELS:
        plurals = [word[:-1] + "ies"]
    elif word.endswith(_HISSING):
        plurals = [word + "es"]
    elif word.endswith("o"):
        plurals = [word + "s", word + "es"]
    elif word.endswith(("lf", "af", "ife")):
        plurals = [word + "s", word.removesuffix("e").removesuffix("f") + "ves"]
    else:
        plurals = [word + "s"]
    return [*plurals, word + "'s"]


def _verb_forms(word: str) -> list[str]:
    """English past and participle, spelt by rule, so that "cared" is no form of "car"; of other words none."""
    if not (word.isascii() and word.isalpha()) or len(word) < 3:
        return []
    if word.endswith("e"):
        return [word + "d", (word if word.endswith("ee") else word[:-1]) + "ing"]
    stems = [word]
    if _doubles(word):
        stems = [word + word[-1]] if _syllables(word) == 1 else [word, word + word[-1]]
    past = word[:-1] + "ied" if word.endswith("y") and word[-2] not in _VOWELS else None
    return [*(stem + "ing" for stem in stems), *([past] if past else (stem + "ed" for stem in stems))]


def _doubles(word: str) -> bool:
    """Whether it ends in consonant, one vowel, and a consonant that may be doubled."""
    return word[-1] not in _VOWELS + "wxy" and word[-2] in _VOWELS and word[-3] not in _VOWELS


def _syllables(word: str) -> int:
    """Groups of vowels."""
    return sum(a in _VOWELS + "y" and b not in _VOWELS + "y" for a, b in zip(word, word[1:] + " ", strict=True))
