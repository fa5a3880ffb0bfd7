"""The page's HTML: its frame, style and scripts, and the policy that lets no other script run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

SCRIPTS = ("data.js", "search.js", "dom.js", "panel.js", "figures.js", "prompts.js", "list.js", "page.js")
"""Of every explorer, written or served; the last thing to run is the caller's."""


def asset(name: str, package: str = "tl_flash.show.report") -> str:
    """A file of the page's front."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def policy(scripts: Sequence[str], *, connect: bool = False, compiled: bool = False) -> str:
    """A content security policy under which these scripts run and no others.

    Args:
        scripts: their text.
        connect: let them ask the page's own server.
        compiled: let them compile code, as plotly does for WebGL with Function().
    """
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    allowed = {
        "default-src": "'none'",
        "script-src": digests + (" 'unsafe-eval'" if compiled else ""),
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "connect-src": "'self'" if connect else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{what} {where}" for what, where in allowed.items())


def html(
    title: str,
    script: str,
    policy: str,
    *,
    style: str = "",
    blobs: Mapping[str, str] | None = None,
    head: str = "",
    beside: str = "",
) -> str:
    """The whole page.

    Args:
        title: as text.
        script: the one that it runs.
        policy: its content security policy.
        style: more of it, after the page's own.
        blobs: what it carries, by name.
        head: more markup in its head.
        beside: more markup after the list and the panel.
    """
    carried = (f'<script type="text/plain" data-blob="{escape(n)}">{b}</script>' for n, b in (blobs or {}).items())
    parts = {
        "POLICY": policy,
        "TITLE": escape(title),
        "HEAD": head,
        "STYLE": asset("style.css") + style,
        "BESIDE": beside,
        "DATA": "\n".join(carried),
        "SCRIPT": script,
    }
    pieces = asset("page.html").split("%%")
    return "".join(parts[piece] if at % 2 else piece for at, piece in enumerate(pieces))
