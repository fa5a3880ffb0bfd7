"""The evidence wing: does a label hold? Doses, matched controls, what a clamped model speaks of, checks of a lens."""

from tl_flash.evidence.controls import Peers
from tl_flash.evidence.lens_check import check_lens
from tl_flash.evidence.mentions import MentionRate, mention_rate, mentions
from tl_flash.evidence.sweep import DoseCurve, clamp_sweep
from tl_flash.evidence.validation import COLUMNS, Validation, validate

__all__ = [
    "COLUMNS",
    "DoseCurve",
    "MentionRate",
    "Peers",
    "Validation",
    "check_lens",
    "clamp_sweep",
    "mention_rate",
    "mentions",
    "validate",
]
