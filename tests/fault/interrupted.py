"""Commands that are stopped half way: started with small transactions, so that there are many
places to stop them, and watched through LMDB's transaction number."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.interop.rig import CHECKOUT, PATIENCE_SECONDS, wait_until

# As the program, except for the size of its transactions.
PROGRAM = """\
from dedupstore import constants
constants.BATCH_BYTES = 1 << 19
constants.GC_DELETE_FRAMES = 4
constants.GC_REWRITE_BYTES = 256 << 10
constants.COMPACT_RUNS = 1
from dedupstore.cli import main
main()
"""
_TRANSACTION = struct.Struct("<Q")
_TRANSACTION_AT = 144  # in each of the two meta pages


def transactions(store: Path) -> int:
    """Number of LMDB's last committed transaction."""
    with (store / "data.mdb").open("rb") as file:
        numbers = [
            _TRANSACTION.unpack(os.pread(file.fileno(), 8, page * 4096 + _TRANSACTION_AT))[0]
            for page in (0, 1)
        ]
    return max(numbers)


def allocated(store: Path) -> int:
    """Bytes that the store's file takes on disk."""
    return (store / "data.mdb").stat().st_blocks * 512


def start(store: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--store", store, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        start_new_session=True,
    )


def stop_after(store: Path, commits: int, number: signal.Signals, *arguments: str | Path) -> str:
    """Run a command, signal it after that many commits, and wait until all of it has ended.

    SIGKILL goes to the process that was started alone, all else to its group like a terminal's
    Ctrl-C. Returns what it wrote on standard error; it may also have finished before the signal.
    """
    begin = transactions(store)
    return stop_when(store, lambda: transactions(store) >= begin + commits, number, *arguments)


def stop_when(
    store: Path, reached: Callable[[], bool], number: signal.Signals, *arguments: str | Path
) -> str:
    """Like `stop_after`, as soon as `reached`."""
    with start(store, *arguments) as process:
        wait_until(lambda: reached() or process.poll() is not None)
        if process.poll() is None:
            if number == signal.SIGKILL:
                process.kill()
            else:
                os.killpg(process.pid, number)
        # Its output ends when the last process that could write to it is gone.
        return process.communicate(timeout=PATIENCE_SECONDS)[1]
