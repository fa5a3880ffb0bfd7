"""The evidence wing: does a label hold? Doses, matched controls, what a clamped model speaks of, checks of a lens.

From a prompt to its neurons (`explain`) go `attribution` (to first order, all neurons), `ablation` (measured), `curve`.
"""

from tl_flash.evidence.controls import Peers, chance_of
from tl_flash.evidence.curve import Curve
from tl_flash.evidence.doses import dose_window, first_guess
from tl_flash.evidence.explaining import explain
from tl_flash.evidence.explanation import ExplainedNeuron, Explanation
from tl_flash.evidence.fluency import Fluency
from tl_flash.evidence.lens_check import check_lens
from tl_flash.evidence.mentions import MentionRate, mention_rate, mentions
from tl_flash.evidence.sweep import DoseCurve, clamp_sweep
from tl_flash.evidence.validation import COLUMNS, DOSE, Validation, validate
from tl_flash.evidence.window import DoseWindow

__all__ = [
    "COLUMNS",
    "DOSE",
    "Curve",
    "DoseCurve",
    "DoseWindow",
    "ExplainedNeuron",
    "Explanation",
    "Fluency",
    "MentionRate",
    "Peers",
    "Validation",
    "chance_of",
    "check_lens",
    "clamp_sweep",
    "dose_window",
    "explain",
    "first_guess",
    "mention_rate",
    "mentions",
    "validate",
]
