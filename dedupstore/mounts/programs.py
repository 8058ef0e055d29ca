"""Runs a program that does its work and returns, and turns how it failed into one line; waits for
what others do."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from dedupstore.errors import ProgramError

_POLL_SECONDS = 0.005


def run_program(command: list[str], timeout_seconds: float) -> None:
    """Run a command from / (a daemon it leaves must not hold the user's directory).

    Raises ProgramError with the last line that it printed on standard error.
    """
    program = Path(command[0]).name
    try:
        result = subprocess.run(
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"no end after {timeout_seconds:.0f} s ({shlex.join(command)})"
        raise ProgramError(program, reason) from None
    if result.returncode:
        text = result.stderr.decode(errors="replace")
        raise ProgramError(program, last_line(text) or f"exit status {result.returncode}")


def last_line(text: str) -> str:
    """The last line of what a program printed; empty if it printed nothing."""
    return next(reversed(text.strip().splitlines()), "")


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Look until a condition holds; False if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
