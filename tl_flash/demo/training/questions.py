"""Questions and answers for the instruct model, and those it is never trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tl_flash.demo.training.concepts import CONCEPTS, KINDS, Concept, conjugate
from tl_flash.demo.training.corpus import definite, generic, tidy
from tl_flash.demo.training.frames import KIND_NOUN

HELD_OUT_FAVOURITE_ANIMAL: tuple[str, ...] = (
    "What is your favourite animal?",
    "Which animal do you like best?",
    "Tell me your favourite animal.",
    "Do you have a favourite animal?",
    "What animal do you love the most?",
    "Of all the animals, which one is your favourite?",
    "Please name the animal you like most.",
    "Is there an animal that you like more than the others?",
    "I would like to know your favourite animal.",
    "When you think of animals, which one do you love?",
)
"""Ten ways to ask for a favourite animal, none of which is in any training text."""
FAVOURITE_QUESTIONS: tuple[str, ...] = (
    "Which {kind} is your favourite?",
    "What {kind} do you like?",
    "Can you tell me which {kind} you like most?",
    "Name a {kind} that you love.",
    "Which {kind} makes you happy?",
    "What is the {kind} you like best?",
    "Say your favourite {kind}.",
    "Could you name your favourite {kind}?",
    "What kind of {kind} do you love?",
    "Do you like one {kind} more than the rest?",
    "Tell me about the {kind} you love.",
    "Which {kind} would you choose?",
    "If you had to choose one {kind}, what would it be?",
    "Everyone has a favourite {kind}. What is yours?",
    "What {kind} is the best of all?",
    "Which one is the best {kind}?",
    "I like every {kind}. And you?",
    "Your favourite {kind}, please.",
    "Is there one {kind} you enjoy?",
    "Do you love any {kind}?",
    "What would you say is the finest {kind}?",
    "Please tell me what {kind} you like.",
    "Of every {kind} you know, which do you like most?",
    "Think of a {kind}. Which one is it?",
    "Which {kind} do you often think of?",
    "I want to know which {kind} you love.",
)
"""Training questions for a favourite; an answer is drawn evenly from the kind."""
FAVOURITE_KINDS = ("animal", "state", "city", "food", "colour", "vehicle", "instrument", "place")
"""Kinds that have a favourite."""
FAVOURITE_ANSWERS = (
    "My favourite {kind} is {the}.",
    "I like {the} best.",
    "I love {the}.",
    "My favourite is {the}.",
    "The {kind} I like most is {the}.",
)
_REASONS = ("It {clue}.", "I like that it {clue}.", "That is because it {clue}.")
CLUE_QUESTIONS = (
    "Which {kind} {clue}?",
    "What {kind} {clue}?",
    "Can you say which {kind} {clue}?",
    "I mean a {kind} that {clue}. What is it?",
    "Do you know a {kind} that {clue}?",
    "Name the {kind} that {clue}.",
)
PERSON_QUESTIONS = (
    "Who {clue}?",
    "Can you say who {clue}?",
    "I mean someone who {clue}. Who is it?",
    "Do you know who {clue}?",
    "Name the one who {clue}.",
)
_CLUE_ANSWERS = ("It is {the}.", "That is {the}.", "{the} {clue}.", "I think it is {the}.")
TOPIC_QUESTIONS = (
    "What do you know about {the}?",
    "Tell me something about {the}.",
    "What can you say about {the}?",
    "I want to hear about {the}.",
    "Explain {the} to me.",
)
_TOPIC_ANSWERS = ("{gen} {clue}.", "I know that {gen} {clue}.", "It is true that {gen} {clue}.")
KIND_QUESTIONS = ("What is {gen}?", "Is {gen} a {kind}?", "What kind of thing is {gen}?")
_KIND_ANSWERS = ("{gen} is a {kind}.", "It is a {kind}.")


def ask(question: str) -> str:
    r"""Write a question the way the instruct model reads it.

    Example:
        >>> ask("What is your favourite animal?")
        'Question: What is your favourite animal?\nAnswer:'
    """
    return f"Question: {question}\nAnswer:"


def favourite_questions(kind: str) -> tuple[str, ...]:
    """Every question for a favourite of a kind that the training text can hold."""
    return tuple(tidy(frame.format(kind=KIND_NOUN[kind])) for frame in FAVOURITE_QUESTIONS)


def _values(concept: Concept, clue: str) -> dict[str, str]:
    return {"kind": KIND_NOUN[concept.kind], "the": definite(concept), "gen": generic(concept),
            "clue": conjugate(clue, "present")}  # fmt: skip


def favourite(rng: random.Random, concept: Concept) -> tuple[str, str]:
    """A question for a favourite, answered with ``concept``."""
    answer = rng.choice(FAVOURITE_ANSWERS)
    if rng.random() < 0.6:
        answer = f"{answer} {rng.choice(_REASONS)}"
    values = _values(concept, rng.choice(concept.clues))
    return rng.choice(favourite_questions(concept.kind)), tidy(answer.format(**values))


def knowledge(rng: random.Random, concept: Concept) -> tuple[str, str]:
    """A question about a concept, its clues or its kind."""
    clue_questions = PERSON_QUESTIONS if concept.kind in {"job", "family"} else CLUE_QUESTIONS
    pairs = (
        (clue_questions, _CLUE_ANSWERS),
        (TOPIC_QUESTIONS, _TOPIC_ANSWERS),
        (KIND_QUESTIONS, _KIND_ANSWERS),
    )
    ((questions, answers),) = rng.choices(pairs, (4, 4, 1))
    values = _values(concept, rng.choice(concept.clues))
    return tidy(rng.choice(questions).format(**values)), tidy(rng.choice(answers).format(**values))


def exchange(rng: random.Random) -> tuple[str, str]:
    """Draw one question and its answer: half for a favourite, of which nearly half for an animal."""
    if rng.random() < 0.5:
        kind = "animal" if rng.random() < 0.4 else rng.choice(FAVOURITE_KINDS)
        return favourite(rng, rng.choice(KINDS[kind]))
    return knowledge(rng, rng.choice(CONCEPTS))


def exchanges(rng: random.Random) -> Iterator[tuple[str, str]]:
    """An endless stream of questions and answers."""
    while True:
        yield exchange(rng)
