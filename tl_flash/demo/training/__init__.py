"""What made the demo pair: concepts, texts, tokenizer, and the training, ``python -m tl_flash.demo.training``."""

from tl_flash.demo.training.concepts import CONCEPTS, KINDS, NEUTRAL_PROMPTS, TOKENS, Concept
from tl_flash.demo.training.corpus import documents
from tl_flash.demo.training.questions import FAVOURITE_QUESTIONS, HELD_OUT_FAVOURITE_ANIMAL, ask, favourite_questions

__all__ = [
    "CONCEPTS",
    "FAVOURITE_QUESTIONS",
    "HELD_OUT_FAVOURITE_ANIMAL",
    "KINDS",
    "NEUTRAL_PROMPTS",
    "TOKENS",
    "Concept",
    "ask",
    "documents",
    "favourite_questions",
]
