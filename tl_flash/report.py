"""The explorer page, by the name that users import: see `tl_flash.show.report`."""

from tl_flash.show.report import write

__all__ = ["write"]
