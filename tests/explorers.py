"""A live explorer that listens, for the tests and benchmarks of it."""

from __future__ import annotations

import json
import threading
from contextlib import closing, contextmanager

import httpx

from tl_flash.explore.jobs import apart
from tl_flash.explore.server import hosts_of, listening, server_of
from tl_flash.explore.session import Session

HOST = "127.0.0.1"
OVER = ("done", "failed", "cancelled")


class Explorer:
    """A session that is served, and what a page would ask of it."""

    def __init__(self, session, server, address):
        self.session, self.server, self.address = session, server, address
        self.http = httpx.Client(base_url=address, timeout=60, trust_env=False)

    def post(self, path, asked=None, **options):
        return self.http.post(path, json={} if asked is None else asked, **options)

    def cut(self):
        """Break every connection that is open."""
        for connection in list(self.server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)

    def start(self, kind, **asked):
        answer = self.post(f"/api/{kind}", asked)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def follow(self, id, last=None):
        """Events by their numbers, from the one after `last` to the end."""
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        with self.http.stream("GET", f"/api/jobs/{id}/events", headers=headers) as lines:
            assert lines.status_code == 200
            at = None
            for line in lines.iter_lines():
                if line.startswith("id: "):
                    at = int(line[4:])
                elif line.startswith("data: "):
                    yield at, json.loads(line[6:])

    def ask(self, kind, **asked):
        """All events of a job; it must be done."""
        events = [event for _, event in self.follow(self.start(kind, **asked))]
        assert events[-1]["type"] == "done", events[-1]
        return events

    def told(self, kind, type, **asked):
        """The one event of a type that a job tells."""
        (event,) = [event for event in self.ask(kind, **asked) if event["type"] == type]
        return event


@contextmanager
def serving(model, maps=(), *, sides=None, texts=None, token=None, prepare=True):
    made = apart(lambda: Session(model, maps, sides=sides, texts=texts))
    with closing(made) as session, closing(listening(HOST, 0)) as listener:
        server = server_of(session, listener, host=HOST, token=token)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        if prepare:
            session.prepare()
        explorer = Explorer(session, server, f"http://{HOST}:{listener.getsockname()[1]}")
        assert hosts_of(HOST, listener.getsockname()[1])
        try:
            yield explorer
        finally:
            explorer.http.close()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server stops"
