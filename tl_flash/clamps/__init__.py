"""The clamps wing: hold neurons at chosen values while a model runs, and see what it does then.

Hooks that clamp (`clamp`; `spots` for many neurons a row), prompts and what a model says after them (`prompts`,
`answers`, `alone`, `generation`, `stepping`), and what neurons do on text (`activations`, `traces`).
"""

from tl_flash.clamps.activations import ActivationStats, activation_stats, residual_length
from tl_flash.clamps.alone import answers_alone
from tl_flash.clamps.answers import Answers
from tl_flash.clamps.caches import reads_its_cache
from tl_flash.clamps.clamping import clamp, clamp_hooks, clamp_rows
from tl_flash.clamps.generation import complete_text, require_room
from tl_flash.clamps.positions import Positions
from tl_flash.clamps.prompts import NEUTRAL_PROMPTS, Prompts, PromptsLike
from tl_flash.clamps.sites import attached, hook_point, neuron_site, require_hooks, run_to
from tl_flash.clamps.spots import clamp_spots
from tl_flash.clamps.stepping import Stepper
from tl_flash.clamps.traces import activations_on
from tl_flash.clamps.values import Mode, named_values

__all__ = [
    "NEUTRAL_PROMPTS",
    "ActivationStats",
    "Answers",
    "Mode",
    "Positions",
    "Prompts",
    "PromptsLike",
    "Stepper",
    "activation_stats",
    "activations_on",
    "answers_alone",
    "attached",
    "clamp",
    "clamp_hooks",
    "clamp_rows",
    "clamp_spots",
    "complete_text",
    "hook_point",
    "named_values",
    "neuron_site",
    "reads_its_cache",
    "require_hooks",
    "require_room",
    "residual_length",
    "run_to",
]
