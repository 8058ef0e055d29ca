"""Threads for calls that may take long and that nobody has to wait for.

Unlike those of concurrent.futures they do not keep a process from ending: a server that is stopped
does not wait for a remote that does not answer. Thread-safe.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


class Workers:
    """At most `limit` threads, made when they are needed. What they run must not raise."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0

    @property
    def busy(self) -> bool:
        """Whether anything is running or waiting to be run."""
        return self._unfinished > 0

    def run(self, task: Callable[[], None]) -> None:
        """Run `task` as soon as a thread is free."""
        with self._lock:
            self._unfinished += 1
            if self._unfinished > len(self._threads) < self._limit:
                thread = threading.Thread(target=self._work, name="fetch", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._tasks.put(task)

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """As `run`, for what returns something or raises."""
        result: Future[_T] = Future()

        def task() -> None:
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        self.run(task)
        return result

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            finally:
                with self._lock:
                    self._unfinished -= 1

    def close(self, seconds: float) -> None:
        """Run what was given, but wait no longer than this for it."""
        deadline = time.monotonic() + seconds
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
