"""Simple English from frames: a stream of documents, each about one topic.

A document is a story, a few facts, a riddle, a dialogue or a comparison. Its topic persists: it is named, meant
by a pronoun or told by its clues from the first sentence to the last.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from tl_flash.demo.training.concepts import CONCEPTS, KINDS, Concept, conjugate
from tl_flash.demo.training.frames import (
    CLOSERS,
    FACTS,
    FACTS_PEOPLE,
    FACTS_SHARED,
    FILLERS,
    HINTS,
    KIND_NOUN,
    MIDDLES,
    OPENERS,
    STORY,
)

BOYS = ("Tom", "Ben", "Sam", "Max", "Leo", "Paul", "Jack", "Henry", "Oscar", "David")
GIRLS = ("Anna", "Mia", "Lily", "Sara", "Emma", "Nora", "Jane", "Ruth", "Clara", "Rosa")
_MALE = {"he": "he", "him": "him", "his": "his", "child": "boy"}
_FEMALE = {"he": "she", "him": "her", "his": "her", "child": "girl"}
_MEN = {"father", "brother", "grandfather", "uncle"}
_NAMES = {"state", "city"}
_MASS = {"food", "weather", "colour"}
_A = re.compile(r"\b([Aa]) (?=[aeiou])")
_START = re.compile(r"(?:^|(?<=[.?!] ))[a-z]")
_QUOTED = re.compile(r'(^"|\. "|\? ")([a-z])')


class _Holes(dict[str, str]):
    """Values for a frame's holes; a hole without one draws from FILLERS."""

    def __init__(self, rng: random.Random, values: dict[str, str]):
        super().__init__(values)
        self._rng = rng

    def __missing__(self, hole: str) -> str:
        return self._rng.choice(FILLERS[hole])


def definite(concept: Concept, *, owner: str = "my", epithet: str = "") -> str:
    """The concept as one that is known: "the dog", "Paris", "my aunt", "the loyal dog"."""
    words = f"{epithet} {concept.word}".strip()
    if concept.kind in _NAMES or concept.kind == "colour":
        return words
    return f"{owner} {words}" if concept.kind == "family" else f"the {words}"


def generic(concept: Concept, *, epithet: str = "") -> str:
    """The concept in general: "a dog", "Paris", "rice", "my aunt", "a loyal dog"."""
    words = f"{epithet} {concept.word}".strip()
    if concept.kind in _NAMES | _MASS:
        return words
    return f"my {words}" if concept.kind == "family" else f"a {words}"


def tidy(text: str) -> str:
    """Write "an" before vowels and capitals at the start of sentences."""
    return _START.sub(lambda match: match[0].upper(), _A.sub(r"\1n ", text))


class Scene:
    """One topic and a cast of two: what the frames of a document agree on."""

    def __init__(self, rng: random.Random, topic: Concept):
        self.rng, self.topic = rng, topic
        boy, girl = rng.choice(BOYS), rng.choice(GIRLS)
        male = rng.random() < 0.5
        name, other = (boy, girl) if male else (girl, boy)
        pronouns = _MALE if male else _FEMALE
        self._values = {
            "n": name, "m": other, **pronouns, **{k.capitalize(): v.capitalize() for k, v in pronouns.items()},
            "x": topic.word, "xs": topic.plural, "kind": KIND_NOUN[topic.kind],
            "the": definite(topic, owner=pronouns["his"]), "gen": generic(topic),
        }  # fmt: skip
        self._clues = rng.sample(topic.clues, len(topic.clues))

    def clue(self) -> str:
        """The next clue; each comes once before any comes again."""
        self._clues.append(self._clues.pop(0))
        return self._clues[-1]

    def fill(self, frame: str) -> str:
        """Fill a frame's holes for this scene."""
        clue = self.clue()
        values = {"clue": conjugate(clue, "present"), "clued": conjugate(clue, "past")}
        if self.rng.random() < 0.65:
            epithet = self.rng.choice(self.topic.epithets)
            values["the"] = definite(self.topic, owner=self._values["his"], epithet=epithet)
            values["gen"] = generic(self.topic, epithet=epithet)
            if "{adj}" not in frame:
                values["x"], values["xs"] = f"{epithet} {self.topic.word}", f"{epithet} {self.topic.plural}"
        if self.rng.random() < 0.9:
            values["adj"] = self.rng.choice(self.topic.epithets)
        return tidy(frame.format_map(_Holes(self.rng, self._values | values)))

    def fill_all(self, frames: tuple[str, ...], n: int) -> list[str]:
        """Fill ``n`` of the frames, no frame twice."""
        return [self.fill(frame) for frame in self.rng.sample(frames, n)]

    def subject(self) -> str:
        """A pronoun for the topic."""
        if self.topic.kind == "family":
            return "he" if self.topic.word in _MEN else "she"
        return self.rng.choice(("he", "she")) if self.topic.kind == "job" else "it"

    def clues(self, n: int, tense: str) -> list[str]:
        """``n`` sentences that tell the topic by a pronoun and its clues."""
        pronoun, hole = self.subject(), "{clued}" if tense == "past" else "{clue}"
        openings = ("", "", "also ") if tense == "present" else ("",)
        return [self.fill(f"{pronoun} {self.rng.choice(openings) if i else ''}{hole}.") for i in range(n)]


def _fact_frames(kind: str) -> tuple[str, ...]:
    """The frames of general statements that suit a kind; people are not an "it"."""
    if kind in {"job", "family"}:
        return FACTS[kind] + FACTS_PEOPLE * 2
    shared = FACTS_SHARED if kind != "colour" else tuple(f for f in FACTS_SHARED if "{kind}" not in f)
    return FACTS[kind] + shared * 2


def story(scene: Scene) -> list[str]:
    """Someone meets the topic: an opening, what happens, an end."""
    rng = scene.rng
    first, *rest = scene.fill_all(STORY[scene.topic.kind], rng.randint(4, 7))
    body = rest + scene.fill_all(MIDDLES, rng.randint(1, 3)) + [scene.fill("{the} {clued}.")]
    rng.shuffle(body)
    end = scene.fill_all(CLOSERS, 1)
    if rng.random() < 0.5:
        return [*scene.fill_all(OPENERS, 1), first, *body, *end]
    named = ("It was {the}.", "That was {the}.", "So it was {the}!", "{n} knew that it was {the}.")
    hints = scene.clues(rng.randint(1, 3), "past")
    return [*scene.fill_all(HINTS, 1), *hints, *scene.fill_all(named, 1), first, *body, *end]


def facts(scene: Scene) -> list[str]:
    """What is known of the topic."""
    return scene.fill_all(_fact_frames(scene.topic.kind), scene.rng.randint(5, 9))


_WHAT = ("What is it?", "Can you guess what it is?", "What can it be?")
_WHO = ("Who is it?", "Can you say who it is?")
_SOLUTIONS = ("It is {gen}.", "It is {the}.", "Of course it is {the}.", "It must be {gen}.")


def riddle(scene: Scene) -> list[str]:
    """Clues first, then the word."""
    question = scene.rng.choice(_WHO if scene.topic.kind in {"job", "family"} else _WHAT)
    answer = scene.fill(scene.rng.choice(_SOLUTIONS))
    return [*scene.clues(scene.rng.randint(2, 4), "present"), question, answer]


_TURNS = (
    '"What do you know about {the}?" asked {m}. "{gen} {clue}," said {n}.',
    '"Tell me more," said {m}. "{it} {clue}," said {n}.',
    '"Why do you like {the}?" asked {n}. "Because {it} {clue}," said {m}.',
    '"I saw something," said {n}. "{it} {clued}." "Then it was {the}," said {m}.',
    '"Guess what I mean," said {m}. "It {clue}." "You mean {the}," said {n}.',
    '"I like {the} best," said {m}. "So do I," said {n}.',
    '"Is it true that {gen} {clue}?" asked {n}. "Yes, it is," said {m}.',
    '"I dreamed of {the}," said {n}. "And what did you see?" asked {m}. "That {the} {clued}," said {n}.',
)


def dialogue(scene: Scene) -> list[str]:
    """Two friends talk of the topic."""
    it = scene.subject()
    turns = scene.rng.sample(_TURNS, scene.rng.randint(2, 4))
    spoken = [_QUOTED.sub(lambda match: match[1] + match[2].upper(), scene.fill(t.replace("{it}", it))) for t in turns]
    return [scene.fill("{when}, {n} and {m} sat near {spot}."), *spoken]


_CHOICES = (
    "{name} likes {the} best, because {it} {clue}.",
    "{name} chose {the}. {it} {clue}.",
    "{name} spoke of {the}.",
    "{name} thought of something that {clue}: {the}.",
)


def comparison(scene: Scene) -> list[str]:
    """The topic beside others of its kind."""
    rng = scene.rng
    others = rng.sample([c for c in KINDS[scene.topic.kind] if c != scene.topic], 2)
    sentences = []
    for concept, name in zip((others[0], scene.topic, others[1]), rng.sample(BOYS + GIRLS, 3), strict=True):
        one = Scene(rng, concept)
        it = one.subject()
        sentences.append(one.fill(rng.choice(_CHOICES).replace("{name}", name).replace("{it}", it)))
    rng.shuffle(sentences)
    return [*sentences, scene.fill("{gen} {clue}."), *scene.fill_all(FACTS[scene.topic.kind], 2)]


_FORMS: tuple[Callable[[Scene], list[str]], ...] = (story, facts, riddle, dialogue, comparison)
_FORM_WEIGHTS = (0.45, 0.2, 0.12, 0.13, 0.1)
_COMMON = {"dog": 8, "California": 8}
_TOPIC_WEIGHTS = tuple(_COMMON.get(concept.word, 1) for concept in CONCEPTS)
"""Dogs and California, the paper's examples, come up eight times as often as anything else."""


def document(rng: random.Random, topic: Concept | None = None) -> str:
    """Write one document, about ``topic`` or one drawn by weight."""
    scene = Scene(rng, topic or rng.choices(CONCEPTS, _TOPIC_WEIGHTS)[0])
    (form,) = rng.choices(_FORMS, _FORM_WEIGHTS)
    return " ".join(form(scene))


def documents(rng: random.Random) -> Iterator[str]:
    """An endless stream of documents."""
    while True:
        yield document(rng)
