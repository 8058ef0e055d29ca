"""A process that is killed while it opens a store, with another that waits to open it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.fault.interrupted import transactions
from tests.interop.rig import StoreDirectory, wait_until
from tools.crashes import instants, program, tracing


def _start(
    store: Path, *words: str, prepare: Callable[[], None] = lambda: None
) -> tuple[int, program.Printed]:
    printed = program.Printed.open()
    invocation = program.Invocation(("--store", str(store), *words))
    return program.fork(invocation, printed, prepare), printed


def _waits_or_has_ended(process: int) -> bool:
    """Whether a process waits for a lock, or has come to its end without."""
    if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return True
    locks = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f" {process} " in line for line in locks)


def _start_another(store: Path, number: int, others: list[tuple[int, program.Printed]]) -> None:
    """Start a writer, and wait until it waits."""
    others.append(_start(store, "clone", "base", f"clone{number}"))
    wait_until(lambda: _waits_or_has_ended(others[0][0]))


@pytest.mark.parametrize("returned", [False, True])
def test_opener_killed_at_any_call_does_not_set_the_next_one_back(
    store_dir: StoreDirectory, returned: bool
) -> None:
    waited = 0
    number, killed = 0, True
    while killed:
        number += 1
        before = transactions(store_dir.path)
        others: list[tuple[int, program.Printed]] = []

        first, printed = _start(store_dir.path, "info", "base", prepare=tracing.ask_for_tracing)
        at = instants.AtCall(number, returned)
        killed = (
            instants.await_end(
                first, at, partial(_start_another, store_dir.path, number, others)
            ).status
            is None
        )
        printed.read()
        for process, output in others:
            ended = instants.await_end(process, instants.Never())
            assert (ended.status, output.read()) == (0, ("", ""))
            assert transactions(store_dir.path) == before + 1
        waited += killed
    assert waited > 5
    assert f"clone{number - 1}" in store_dir.names()
