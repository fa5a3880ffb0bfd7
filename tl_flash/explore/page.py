"""The live page: the explorer's own front, and what asks the server beside it."""

from __future__ import annotations

from tl_flash.explore.session import Session
from tl_flash.show.report import layout

SCRIPTS = ("server.js", "asking.js", "tray.js", "answers.js", "finding.js", "measuring.js", "path.js", "live.js")
_FRONT = "tl_flash.explore.front"


def page(session: Session) -> tuple[str, str]:
    """Its HTML, and the content security policy that it is to be sent with."""
    shared = [layout.asset(name) for name in layout.SCRIPTS]
    own = [layout.asset(name, _FRONT) for name in SCRIPTS]
    script = "\n".join([*shared, *own])
    policy = layout.policy([script], connect=True)
    text = layout.html(
        session.name,
        script,
        policy,
        style=layout.asset("live.css", _FRONT),
        head='<link rel="icon" href="data:,">',
        beside=layout.asset("live.html", _FRONT),
    )
    return text, policy
