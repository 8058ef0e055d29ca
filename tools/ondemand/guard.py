"""Runs a program for as long as its starter lives: `guard.py [--remove FILE]... -- PROGRAM...`

The starter holds the other end of standard input. When that ends, whether by `close` or because the
starter was killed, the program is terminated, given a second, killed, and the files are removed.
The exit status is the program's. Imports nothing of the project: it starts in 20 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

_PATIENCE_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> int:
    """Run the program named behind `--`; returns its exit status."""
    at = words.index("--")
    files = [word for word in words[:at] if word != "--remove"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the starter, which ends us
    with subprocess.Popen(
        words[at + 1 :],
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_us,  # noqa: PLW1509 - there are no threads here
    ) as program:
        try:
            _wait(program)
        finally:
            _end(program)
            for file in files:
                with contextlib.suppress(OSError):
                    Path(file).unlink()
    return program.returncode


def _wait(program: subprocess.Popen[bytes]) -> None:
    """Until the program has ended or standard input has."""
    watched = os.pidfd_open(program.pid)
    try:
        while True:
            ready, _, _ = select.select([0, watched], [], [])
            if watched in ready or not os.read(0, 4096):
                return
    finally:
        os.close(watched)


def _end(program: subprocess.Popen[bytes]) -> None:
    program.terminate()
    try:
        program.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        program.kill()


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
