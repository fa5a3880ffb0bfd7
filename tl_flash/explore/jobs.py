"""Work done one piece at a time beside the page. What it tells is kept, so that a lost connection can come back."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tl_flash.progress import watching

WAITING, KEPT = 16, 64
"""Jobs that may wait or run, and how many ended ones are remembered."""
_PAUSE = 0.2
"""Seconds between two tellings of progress."""

_log = logging.getLogger(__name__)
Work = Callable[["Job"], None]
Made = TypeVar("Made")


class Cancelled(Exception):
    """The job was cancelled; raised in it by `check`."""


class Busy(Exception):
    """Too many jobs wait."""


class Job:
    """One piece of work, and everything that it told, in order.

    `events` only ever grows; the last is of type "done", "failed" or "cancelled".
    """

    def __init__(self, id: str, kind: str) -> None:
        self.id, self.kind = id, kind
        self.events: list[dict[str, Any]] = []
        self.over = False
        self._cancelled = False
        self._told = 0.0
        self._waiters: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._lock = threading.Lock()

    def tell(self, type: str, **event: Any) -> None:
        """Add an event, from any thread.

        Args:
            type: of the event.
            event: what JSON can hold.
        """
        with self._lock:
            self.events.append({"type": type, **event})
            for waiter, loop in self._waiters.items():
                loop.call_soon_threadsafe(waiter.set)

    def check(self) -> None:
        """Raise Cancelled where the job is."""
        if self._cancelled:
            raise Cancelled

    def watch(self, what: str, done: int, total: int | None) -> None:
        """Tell progress, not too often; a `Watcher`."""
        self.check()
        now = time.monotonic()
        if now - self._told > _PAUSE:
            self._told = now
            self.tell("progress", what=what, done=done, total=total)

    def cancel(self) -> None:
        """Ask it to end: at its next check, or before it begins."""
        self._cancelled = True

    async def follow(self, start: int = 0) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Its events with their numbers from `start` on, as they come, to the last."""
        at, woken = start, asyncio.Event()
        with self._lock:
            self._waiters[woken] = asyncio.get_running_loop()
        try:
            while True:
                woken.clear()
                over = self.over  # read first: nothing is told after it
                for event in self.events[at:]:
                    yield at, event
                    at += 1
                if over:
                    return
                await woken.wait()
        finally:
            with self._lock:
                del self._waiters[woken]

    def end(self, future: Future[None]) -> None:
        """Tell how it ended."""
        trouble = CancelledError() if future.cancelled() else future.exception()
        if trouble is None:
            self._last("done")
        elif isinstance(trouble, Cancelled | CancelledError):
            self._last("cancelled")
        else:
            if not isinstance(trouble, ValueError | TypeError | KeyError | RuntimeError):
                _log.error("job %s", self.id, exc_info=trouble)  # no refusal, but a fault
            message = trouble.args[0] if isinstance(trouble, KeyError) else trouble
            self._last("failed", why=f"{message}" or type(trouble).__name__)

    def _last(self, type: str, **event: Any) -> None:
        with self._lock:
            self.events.append({"type": type, **event})
            self.over = True
            for waiter, loop in self._waiters.items():
                loop.call_soon_threadsafe(waiter.set)


class Jobs:
    """A queue with one worker: a model cannot do two things at a time."""

    def __init__(self) -> None:
        self.idle = threading.Event()
        """Set while nothing runs or waits."""
        self.idle.set()
        self._jobs: dict[str, Job] = {}
        self._futures: dict[str, Future[None]] = {}
        self._count = 0
        self._worker = ThreadPoolExecutor(1, "model")
        self._lock = threading.Lock()

    def start(self, kind: str, work: Work) -> Job:
        """Queue work.

        Args:
            kind: a word for it.
            work: given its job, to tell and to check.

        Raises:
            Busy: too many wait.
        """
        with self._lock:
            if len(self._futures) >= WAITING:
                raise Busy(f"{len(self._futures)} jobs run or wait; cancel one, or ask again when one is done")
            self._count += 1
            job = Job(f"{kind}-{self._count}", kind)
            self._jobs[job.id] = job
            for id in [id for id, one in self._jobs.items() if one.over][:-KEPT]:
                del self._jobs[id]
            self.idle.clear()
            future = self._futures[job.id] = self._worker.submit(_run, job, work)
        future.add_done_callback(lambda future: self._ended(job, future))
        return job

    def __getitem__(self, id: str) -> Job:
        """A job by its id; KeyError where it never was or is forgotten."""
        if id not in self._jobs:
            raise KeyError(f"no job {id!r}; it never was, or ended long ago")
        return self._jobs[id]

    def ahead(self, job: Job) -> int:
        """How many run or wait before this one."""
        waiting = list(self._futures)
        return waiting.index(job.id) if job.id in waiting else 0

    def cancel(self, id: str) -> Job:
        """Cancel a job, running or waiting; one that is over stays as it is."""
        job = self[id]
        job.cancel()
        future = self._futures.get(id)
        if future is not None:
            future.cancel()
        return job

    def close(self) -> None:
        """Cancel everything and take nothing more."""
        for id in list(self._futures):
            self.cancel(id)
        self._worker.shutdown(wait=False, cancel_futures=True)
        self.idle.set()

    def _ended(self, job: Job, future: Future[None]) -> None:
        with self._lock:
            del self._futures[job.id]
            if not self._futures:
                self.idle.set()
        job.end(future)


def apart(work: Callable[[], Made]) -> Made:
    """What `work` returns, made in a thread that ends with it.

    OpenMP keeps a team of threads for every thread that has computed, and where there are more of all these than cores
    it lets a team sleep after each loop: jobs take a third longer in a process whose main thread loaded the model.

    Raises:
        BaseException: what `work` raises.
    """
    future: Future[Made] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised again where it is waited for
            future.set_exception(error)

    threading.Thread(target=run, name="apart", daemon=True).start()
    return future.result()


def _run(job: Job, work: Work) -> None:
    job.check()
    job.tell("started")
    with watching(job.watch):
        work(job)
