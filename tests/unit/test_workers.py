"""Threads whose work nobody has to wait for."""

from __future__ import annotations

import subprocess
import sys
import threading

from dedupstore.remote.workers import Workers
from tests.conftest import hammered

PATIENCE_SECONDS = 60.0


def test_everything_that_is_given_is_run() -> None:
    done: list[int] = []

    def work() -> None:
        workers = Workers(4)
        for number in range(500):
            workers.run(lambda number=number: done.append(number))  # type: ignore[misc]
        workers.close(PATIENCE_SECONDS)

    hammered(work)
    assert sorted(done) == list(range(500))


def test_a_thread_is_made_only_when_none_is_free_and_never_one_too_many() -> None:
    workers = Workers(2)
    begun, go = threading.Semaphore(0), threading.Event()
    running: list[int] = []
    most: list[int] = []

    def task() -> None:
        running.append(1)
        most.append(len(running))
        begun.release()
        go.wait(PATIENCE_SECONDS)
        running.pop()

    for _ in range(5):
        workers.run(task)
    assert begun.acquire(timeout=PATIENCE_SECONDS)
    assert begun.acquire(timeout=PATIENCE_SECONDS)
    assert workers.busy
    assert len(workers._threads) == 2
    go.set()
    workers.close(PATIENCE_SECONDS)
    assert max(most) == 2
    assert len(most) == 5
    assert not workers.busy


def test_close_does_not_wait_for_what_takes_too_long() -> None:
    workers = Workers(1)
    stuck, done = threading.Event(), threading.Event()

    def task() -> None:
        stuck.wait(PATIENCE_SECONDS)
        done.set()

    workers.run(task)
    workers.close(0.01)
    assert not done.is_set()
    assert workers.busy
    stuck.set()
    assert done.wait(PATIENCE_SECONDS)


def test_a_process_ends_while_a_task_is_stuck() -> None:
    program = (
        "import threading\n"
        "from dedupstore.remote.workers import Workers\n"
        "Workers(1).run(threading.Event().wait)\n"
        "print('ends')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert (result.stdout, result.stderr) == ("ends\n", "")
