"""Who speaks of a word, before and after a clamp."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tl_flash.clamps import Mode, Positions, Prompts, PromptsLike, clamp, complete_text
from tl_flash.names import NeuronKey
from tl_flash.progress import track

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class MentionRate:
    """How many completions speak of a word, before and after a clamp."""

    word: str
    prompts: tuple[str, ...]
    completions_before: tuple[str, ...]
    completions_after: tuple[str, ...]
    mentions_before: tuple[bool, ...]
    mentions_after: tuple[bool, ...]

    @property
    def before(self) -> float:
        """Share of the unclamped completions that speak of the word."""
        return sum(self.mentions_before) / len(self.prompts)

    @property
    def after(self) -> float:
        """Share of the clamped completions that speak of the word."""
        return sum(self.mentions_after) / len(self.prompts)

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a prompt."""
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": self.prompts,
                "before": self.completions_before,
                "after": self.completions_after,
                "mentions_before": self.mentions_before,
                "mentions_after": self.mentions_after,
            }
        )

    def __str__(self) -> str:
        n = len(self.prompts)
        lines = [f"{self.word!r} in {sum(self.mentions_before)} of {n} before, {sum(self.mentions_after)} of {n} after"]
        for prompt, before, after in zip(self.prompts, self.completions_before, self.completions_after, strict=True):
            lines += [f"{prompt!r}", f"  before: {before.strip()}", f"  after:  {after.strip()}"]
        return "\n".join(lines)


def mention_rate(
    model: Any,
    prompts: PromptsLike,
    word: str,
    neurons: Mapping[NeuronKey, float | Tensor],
    *,
    chat: bool = False,
    max_new_tokens: int = 24,
    positions: Positions = None,
    mode: Mode = "set",
    do_sample: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> MentionRate:
    """Let a model complete prompts with and without a clamp, and count who speaks of a word.

    A completion speaks of the word where it `mentions` it; the prompt does not count.

    Args:
        model: a HookedTransformer or a TransformerBridge with a tokenizer.
        prompts: texts or conversations to complete, one at a time, as `Prompts.of` takes them.
        word: such as "dog".
        neurons: a value for each neuron, as `clamp` takes them.
        chat: each text is what a user says, in the tokenizer's chat template.
        max_new_tokens: length of a completion at most.
        positions: as in `clamp`.
        mode: as in `clamp`.
        do_sample: draw tokens instead of taking the likeliest.
        seed: of the draws, the same before and after.
        progress: a bar; by default on a terminal or in a notebook.

    Raises:
        TypeError: prompts of another kind, or one string.
        ValueError: no prompts, an empty word, or what `clamp` refuses.

    Example:
        >>> rate = mention_rate(model, ["My favourite animal is"], "dog", {"L1N3": 2.0}, max_new_tokens=3)
        >>> rate.before in (0.0, 1.0)
        True
    """
    word = require_word(word)
    texts = Prompts.of(model, prompts, chat=chat)

    def complete(row: Tensor) -> str:
        return complete_text(model, row, max_new_tokens, do_sample=do_sample, seed=seed)

    before = tuple(complete(row) for row in track(texts.rows, "unclamped", progress))
    after = []
    for row in track(texts.rows, "clamped", progress):
        with clamp(model, neurons, mode=mode, positions=positions):  # anew: one clamp follows one sequence
            after.append(complete(row))
    asked = zip(texts.texts, texts.rows, strict=True)
    return MentionRate(
        word=word,
        prompts=tuple(model.tokenizer.decode(row) if text is None else text for text, row in asked),
        completions_before=before,
        completions_after=tuple(after),
        mentions_before=tuple(mentions(text, word) for text in before),
        mentions_after=tuple(mentions(text, word) for text in after),
    )


def mentions(text: str, word: str) -> bool:
    """Whether a text holds a word, or its plural in -s, as a word of its own, in any case.

    Where the script writes no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) the word is
    found anywhere; Korean appends particles to it. An end that is no letter or digit, as of "C++", bounds itself.

    Raises:
        TypeError: the word is no text.
        ValueError: it is nothing but spaces.

    Example:
        >>> from tl_flash.evidence import mentions
        >>> mentions("Dogs are fun.", "dog"), mentions("A hotdog.", "dog"), mentions("我喜欢狗。", "狗")
        (True, False, True)
    """
    text, word = (unicodedata.normalize("NFC", part) for part in (text, require_word(word)))
    plural = "s?" if _kind(word[-1]) is _Kind.SPACED else ""
    pattern = r"\s+".join(map(re.escape, word.split())) + plural
    return any(_stands_alone(text, *match.span()) for match in re.finditer(pattern, text, re.IGNORECASE))


class _Kind(Enum):
    """What a character says of where words end."""

    BOUND = "no part of a word"
    SPACED = "of words with spaces between them"
    SUFFIXED = "of words that take particles without a space"
    UNSPACED = "of words without spaces between them"


_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def require_word(word: Any) -> str:
    """A word to look for, without spaces around it.

    Raises:
        TypeError: no text.
        ValueError: nothing but spaces.
    """
    if not isinstance(word, str):
        raise TypeError(f"word: expected a word, got {type(word).__name__}")
    if not word.strip():
        raise ValueError(f"word: expected a word, got {word!r}")
    return word.strip()


def _kind(char: str) -> _Kind:
    if unicodedata.category(char)[0] not in "LMN" and char != "_":
        return _Kind.BOUND
    name = unicodedata.name(char, "")
    if name.startswith(_UNSPACED):
        return _Kind.UNSPACED
    return _Kind.SUFFIXED if name.startswith("HANGUL") else _Kind.SPACED


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] is neither begun before nor goes on behind."""
    first, last = _kind(text[start]), _kind(text[end - 1])
    begun = start > 0 and first in (_Kind.SPACED, _Kind.SUFFIXED) and _kind(text[start - 1]) is first
    goes_on = end < len(text) and last is _Kind.SPACED and _kind(text[end]) is last
    return not begun and not goes_on
