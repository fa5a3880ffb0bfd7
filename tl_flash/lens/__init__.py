"""The lens wing: what the rest of a model makes of what is written in its middle, as a matrix a layer.

One way to make it (`making`), by three methods: from forward passes alone (`mean_field`; `passages` are what they show,
`classes` which tokens are averaged apart, `blocks` what a passage says of a block, `factors` and `norms` the closed
forms), by backward passes (`exact`), or both (`mixed`). `published` takes over those of others. `linear` changes what
gradients flow through.
"""

from tl_flash.lens.lens import JacobianLens
from tl_flash.lens.linear import Rule, linearised, require_rule
from tl_flash.lens.making import jacobian_lens, lens_of
from tl_flash.lens.targets import first_target, folded_unembedding, normalised, vocabulary_covariance
from tl_flash.lens.texts import own_texts

__all__ = [
    "JacobianLens",
    "Rule",
    "first_target",
    "folded_unembedding",
    "jacobian_lens",
    "lens_of",
    "linearised",
    "normalised",
    "own_texts",
    "require_rule",
    "vocabulary_covariance",
]
