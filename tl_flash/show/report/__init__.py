"""Results to one offline HTML page: search a map as one types, read its neurons, compare and check them."""

from tl_flash.show.report.page import write

__all__ = ["write"]
