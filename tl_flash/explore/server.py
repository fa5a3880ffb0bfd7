"""Serve a session on this machine, until it is interrupted."""

from __future__ import annotations

import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import uvicorn

    from tl_flash.explore.session import Session
    from tl_flash.maps import NeuronMap

EXTRA = 'pip install "tl_flash[explore]"'


def require_extra() -> None:
    """Refuse where the packages of the extra are missing.

    Raises:
        ImportError: one is; the message says how to install them.
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the live explorer needs {' and '.join(missing)}, which are not installed: {EXTRA}")


def serve(
    model: Any,
    maps: Sequence[NeuronMap] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    sides: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    browser: bool = True,
    say: Callable[[str], None] | None = None,
) -> None:
    """Serve the live explorer of a model: ask it, find neurons, clamp them, and read both answers side by side.

    What no map is given for is decoded beside the page, which opens at once. It ends when interrupted.

    Args:
        model: a HookedTransformer or a TransformerBridge with a tokenizer, as `load_model` gives it.
        maps: sides of it that are decoded already.
        host: where to listen; another than this machine's loopback address only with a token.
        port: where to listen; 0 for a free one.
        token: what whoever opens the page has to know; "new" makes one.
        sides: those to decode beside the maps given; by default all others.
        texts: on which neurons' ranges, the units of doses, are measured; by default some of the package's own.
        browser: open the page in a browser.
        say: told the address.

    Raises:
        ImportError: the extra is not installed.
        TypeError: no such model or maps.
        ValueError: an address beyond this machine without a token, a model without a tokenizer, or maps of another.
        OSError: the port is taken.
    """
    require_extra()
    from tl_flash.explore.jobs import apart
    from tl_flash.explore.session import Session

    token = secrets.token_urlsafe(16) if token == "new" else token
    require_safe(host, token)
    made = apart(lambda: Session(model, maps, sides=sides, texts=texts))
    with closing(made) as session, closing(listening(host, port)) as listener:
        server = server_of(session, listener, host=host, token=token)
        address = f"http://{_shown(host)}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
        if say is not None:
            say(address)
        session.prepare()
        if browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()  # it may wait for an answer
        server.run([listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that a browser that comes early waits.

    Raises:
        OSError: the address is taken, or none of this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise OSError(f"{host}:{port}: {error.strerror or error}; give another --port, or 0 for a free one") from None
    return listener


def server_of(session: Session, listener: socket.socket, *, host: str, token: str | None) -> uvicorn.Server:
    """The server of a session on a socket that listens."""
    import uvicorn

    from tl_flash.explore.app import app_of

    app = app_of(session, hosts=hosts_of(host, listener.getsockname()[1]), token=token)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def require_safe(host: str, token: str | None) -> None:
    """Refuse to listen beyond this machine without a token.

    Raises:
        ValueError: the host is not a loopback address and there is no token, or a short one.
    """
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable()):
        raise ValueError('token: expected 8 or more printable characters of ASCII, or "new" for one that is made')
    if token is None and not is_loopback(host):
        raise ValueError(
            f"host: {host} is reached from other machines, and whoever reaches it may run the model; give a token "
            '("new" makes one), or listen on 127.0.0.1 and tunnel to it with ssh -L'
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_of(host: str, port: int) -> frozenset[str] | None:
    """What a browser may call the server by; None, anything, where it listens on every address, behind its token."""
    if host in ("0.0.0.0", "::"):
        return None
    names = {_shown(host), *(("127.0.0.1", "localhost", "[::1]") if is_loopback(host) else ())}
    return frozenset(f"{name}:{port}".lower() for name in names) | (frozenset(names) if port == 80 else frozenset())


def _shown(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
