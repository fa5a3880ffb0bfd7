"""The clamps wing: hold neurons at chosen values while a model runs, and see what it does then.

Hooks that clamp (`clamp`), prompts and what a model says after them (`prompts`, `answers`, `alone`, `generation`), and
what neurons do on text (`activations`).
"""

from tl_flash.clamps.activations import ActivationStats, activation_stats
from tl_flash.clamps.alone import answers_alone
from tl_flash.clamps.answers import Answers
from tl_flash.clamps.clamping import clamp, clamp_hooks, clamp_rows
from tl_flash.clamps.generation import complete_text
from tl_flash.clamps.positions import Positions
from tl_flash.clamps.prompts import NEUTRAL_PROMPTS, Prompts
from tl_flash.clamps.sites import attached, hook_point
from tl_flash.clamps.values import Mode

__all__ = [
    "NEUTRAL_PROMPTS",
    "ActivationStats",
    "Answers",
    "Mode",
    "Positions",
    "Prompts",
    "activation_stats",
    "answers_alone",
    "attached",
    "clamp",
    "clamp_hooks",
    "clamp_rows",
    "complete_text",
    "hook_point",
]
