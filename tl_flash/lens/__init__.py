"""The lens wing: what the rest of a model makes of what is written in its middle, as a matrix a layer."""

from tl_flash.lens.lens import JacobianLens
from tl_flash.lens.making import jacobian_lens, lens_of
from tl_flash.lens.targets import first_target, normalised

__all__ = ["JacobianLens", "first_target", "jacobian_lens", "lens_of", "normalised"]
