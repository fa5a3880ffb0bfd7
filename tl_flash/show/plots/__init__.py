"""Results to plotly figures: each function takes results, never a model, returns a go.Figure and shows nothing.

Every function takes `theme="light"` or `"dark"`. Colours are Okabe and Ito's, told apart by readers of every colour
vision; tokens stand quoted, with what does not print escaped, so that no token is taken for markup.
"""

from tl_flash.show.plots.atlas import neuron_atlas
from tl_flash.show.plots.concept_layers import concepts
from tl_flash.show.plots.effects import dose_curve, lens_effects, validation
from tl_flash.show.plots.explanations import explanation
from tl_flash.show.plots.layers import agreement, changed, specialisation
from tl_flash.show.plots.neurons import neuron, token_by_layer

__all__ = [
    "agreement",
    "changed",
    "concepts",
    "dose_curve",
    "explanation",
    "lens_effects",
    "neuron",
    "neuron_atlas",
    "specialisation",
    "token_by_layer",
    "validation",
]
