"""The lens wing: what the rest of a model makes of what is written in its middle, as a matrix a layer."""

from tl_flash.lens.exact import jacobian_lens
from tl_flash.lens.lens import JacobianLens

__all__ = ["JacobianLens", "jacobian_lens"]
