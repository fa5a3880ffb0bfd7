"""Say what each MLP neuron of a language model stands for, straight from its weights, and test it causally."""

from tl_flash.clamps import ActivationStats, activation_stats, clamp, clamp_hooks
from tl_flash.decode import concepts, decode_directions, decode_to_file, find_neurons, flash_decode
from tl_flash.evidence import (
    DoseCurve,
    DoseWindow,
    Explanation,
    MentionRate,
    Validation,
    check_lens,
    clamp_sweep,
    dose_window,
    explain,
    mention_rate,
    validate,
)
from tl_flash.lens import JacobianLens, jacobian_lens
from tl_flash.maps import Comparison, ConceptHit, ConceptHits, ConceptTable, Hit, Hits, NeuronMap, TopTokens, compare
from tl_flash.names import ExpertNeuron, Neuron
from tl_flash.weights import load_model

__all__ = [
    "ActivationStats",
    "Comparison",
    "ConceptHit",
    "ConceptHits",
    "ConceptTable",
    "DoseCurve",
    "DoseWindow",
    "Explanation",
    "ExpertNeuron",
    "Hit",
    "Hits",
    "JacobianLens",
    "MentionRate",
    "Neuron",
    "NeuronMap",
    "TopTokens",
    "Validation",
    "activation_stats",
    "check_lens",
    "clamp",
    "clamp_hooks",
    "clamp_sweep",
    "compare",
    "concepts",
    "decode_directions",
    "decode_to_file",
    "dose_window",
    "explain",
    "find_neurons",
    "flash_decode",
    "jacobian_lens",
    "load_model",
    "mention_rate",
    "validate",
]
