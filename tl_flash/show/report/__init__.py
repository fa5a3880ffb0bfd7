"""Results to one offline HTML page: search a map as one types, read its neurons, compare and check them.

`page` writes it, of what `given` lets pass: `layout` is the HTML and its scripts, `contents` what they are told, `pack`
how arrays travel. The live explorer is served of the same files.
"""

from tl_flash.show.report.page import write

__all__ = ["write"]
