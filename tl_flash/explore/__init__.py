"""The explore wing: a page with the model behind it, served on this machine (extra `tl_flash[explore]`).

`server` listens; `guard` decides who may ask, `asked` for what, `app` which address does it; `jobs` runs one thing at a
time in the `session`'s model: `writing`, `finding`, `measuring`. `page` is the front, that of `show.report` and the
files in `front/` beside it.
"""

from tl_flash.explore.jobs import apart
from tl_flash.explore.server import require_extra, require_safe, serve

__all__ = ["apart", "require_extra", "require_safe", "serve"]
