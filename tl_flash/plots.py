"""The figures, by the name that users import: see `tl_flash.show.plots`."""

from tl_flash.show.plots import (
    agreement,
    changed,
    concepts,
    dose_curve,
    lens_effects,
    neuron,
    neuron_atlas,
    specialisation,
    token_by_layer,
    validation,
)

__all__ = [
    "agreement",
    "changed",
    "concepts",
    "dose_curve",
    "lens_effects",
    "neuron",
    "neuron_atlas",
    "specialisation",
    "token_by_layer",
    "validation",
]
