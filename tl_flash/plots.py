"""The figures, by the name that users import: see `tl_flash.show.plots`."""

from tl_flash.show import plots as _plots
from tl_flash.show.plots import *  # noqa: F403

__all__ = _plots.__all__  # pyright: ignore[reportUnsupportedDunderAll]
