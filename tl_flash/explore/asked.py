"""What the page may ask for, and within which bounds; anything else is refused with the field's name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from tl_flash.clamps import Mode
from tl_flash.names import Neuron

LONGEST_PROMPT, LONGEST_TEXT, LONGEST_CONCEPT = 4000, 20_000, 80
"""Characters."""
MOST_TOKENS, MOST_CLAMPS, MOST_DOSE = 128, 32, 1000.0
POSITIONS = ("all", "prompt", "generated", "last")


class Refused(ValueError):
    """A request that is none; its text says what was expected."""


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refused: it holds none.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("expected a JSON object, got something that JSON does not read") from None
    if not isinstance(asked, dict):
        raise Refused(f"expected a JSON object, got {type(asked).__name__}")
    return asked


@dataclass(frozen=True)
class Fields:
    """The fields of a request, each asked for once; `close` refuses those that nobody asked for."""

    given: dict[str, Any]

    @classmethod
    def of(cls, body: bytes) -> Fields:
        """Those of a body."""
        return cls(read_json(body))

    def text(self, name: str, most: int, *, least: int = 1) -> str:
        """A text of some length."""
        value = self.given.pop(name, None)
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise Refused(f"{name}: expected a text of {least} to {most} characters, got {_told(value)}")
        if any(0xD800 <= ord(letter) < 0xE000 for letter in value):
            raise Refused(f"{name}: expected Unicode text, got half of a surrogate pair")
        return value

    def whole(self, name: str, least: int, most: int) -> int:
        """A whole number."""
        value = self.given.pop(name, None)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise Refused(f"{name}: expected a whole number from {least} to {most}, got {_told(value)}")
        return value

    def sign(self) -> int:
        """1 or -1."""
        value = self.given.pop("sign", None)
        if value not in (1, -1) or isinstance(value, bool):
            raise Refused(f"sign: expected 1 or -1, got {_told(value)}")
        return int(value)

    def truth(self, name: str) -> bool:
        """True or false; false where it is left out."""
        value = self.given.pop(name, False)
        if not isinstance(value, bool):
            raise Refused(f"{name}: expected true or false, got {_told(value)}")
        return value

    def choice(self, name: str, among: tuple[str, ...]) -> str:
        """One of some words, by default the first."""
        value = self.given.pop(name, among[0])
        if value not in among:
            raise Refused(f"{name}: expected one of {', '.join(among)}, got {_told(value)}")
        return value

    def neuron(self, name: str = "neuron") -> Neuron:
        """A neuron by its name."""
        return neuron_named(name, self.given.pop(name, None))

    def doses(self, name: str) -> dict[Neuron, float]:
        """Neurons, each with its dose."""
        value = self.given.pop(name, {})
        if not isinstance(value, Mapping) or len(value) > MOST_CLAMPS:
            raise Refused(f"{name}: expected at most {MOST_CLAMPS} neurons with their doses, got {_told(value)}")
        return {neuron_named(name, key): _number(f"{name}.{key}", dose, MOST_DOSE) for key, dose in value.items()}

    def ids(self, name: str, most: int, d_vocab: int) -> list[int] | None:
        """Ids of tokens; None where they are left out."""
        value = self.given.pop(name, None)
        if value is None:
            return None
        good = isinstance(value, list) and 0 < len(value) <= most
        if not good or not all(isinstance(id, int) and id is not True and 0 <= id < d_vocab for id in value):
            raise Refused(f"{name}: expected 1 to {most} ids of tokens below {d_vocab}, got {_told(value)}")
        return value

    def close(self) -> None:
        """Refuse what is left."""
        if self.given:
            raise Refused(f"expected no field {', '.join(map(repr, sorted(self.given)[:3]))}")


@dataclass(frozen=True)
class Writing:
    """A prompt to go on with, and what to clamp meanwhile."""

    prompt: str
    chat: bool
    n_tokens: int
    doses: Mapping[Neuron, float]
    mode: Mode
    positions: str

    @classmethod
    def of(cls, fields: Fields) -> Writing:
        """What a request asks for."""
        asked = cls(
            prompt=fields.text("prompt", LONGEST_PROMPT),
            chat=fields.truth("chat"),
            n_tokens=fields.whole("n_tokens", 1, MOST_TOKENS),
            doses=fields.doses("doses"),
            mode=fields.choice("mode", get_args(Mode)),  # pyright: ignore[reportArgumentType] - it is one of them
            positions=fields.choice("positions", POSITIONS),
        )
        fields.close()
        return asked


def neuron_named(field: str, name: Any) -> Neuron:
    """A neuron such as "L3N17"."""
    if not isinstance(name, str) or len(name) > 24:
        raise Refused(f"{field}: expected a neuron such as L3N17, got {_told(name)}")
    try:
        return Neuron.of(name)
    except ValueError as error:
        raise Refused(f"{field}: {error}") from None


def _number(name: str, value: Any, most: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or abs(value) > most:
        raise Refused(f"{name}: expected a number from {-most:g} to {most:g}, got {_told(value)}")
    return float(value)


def _told(value: Any) -> str:
    """What was got, in few words."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"a text of {len(value)} characters"
    if isinstance(value, list | dict):
        return f"{len(value)} of them in a {type(value).__name__}"
    return "nothing" if value is None else repr(value)[:40]
