"""Say what each MLP neuron of a language model stands for, straight from its weights, and test it causally."""

from tl_flash.activations import ActivationStats, activation_stats
from tl_flash.clamp import clamp, clamp_hooks
from tl_flash.compare import Comparison, compare
from tl_flash.decode import decode_directions, flash_decode
from tl_flash.experiments import DoseCurve, MentionRate, clamp_sweep, mention_rate
from tl_flash.hits import Hit, Hits
from tl_flash.lens import JacobianLens, jacobian_lens
from tl_flash.lens_check import check_lens
from tl_flash.neuron_map import NeuronMap
from tl_flash.neurons import ExpertNeuron, Neuron
from tl_flash.top_tokens import TopTokens
from tl_flash.validation import Validation, validate

__all__ = [
    "ActivationStats",
    "Comparison",
    "DoseCurve",
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
    "decode_directions",
    "flash_decode",
    "jacobian_lens",
    "mention_rate",
    "validate",
]
