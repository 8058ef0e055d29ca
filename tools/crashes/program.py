"""Runs dedupstore's commands as processes that can be killed.

`fork` is the program in a fork of this process: the code behind its entry point, without the 60 ms
that Python takes to start and without the parent that explains signals (`cli.guard`), so that what
is killed is the command itself. `spawn` is `.venv/bin/dedupstore`, all of it. Forks have small
transactions (as tests/fault/interrupted.py does), so that an import of 2 MB has a dozen commits to
be killed between; spawned programs have the real ones.

Nobody may open a store in the process that forks, and it must have no threads while it does.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dedupstore import constants

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).with_name("dedupstore")
PATIENCE_SECONDS = 120  # only what hangs takes that long; SIGALRM then ends it
_TRACEBACK = 70

# Before any module that uses them is loaded.
constants.BATCH_BYTES = 128 << 10
constants.GC_DELETE_FRAMES = 4
constants.GC_REWRITE_BYTES = 512 << 10

_main = importlib.import_module("dedupstore.cli.main")
for _name in ("images", "maintenance", "pulling", "remotes", "transfers"):
    importlib.import_module(f"dedupstore.cli.{_name}")
_MODULES = ("check", "export", "gc", "imports", "remote.evicting", "remote.pulling")
for _name in _MODULES:
    importlib.import_module(f"dedupstore.{_name}")


@dataclass(frozen=True, slots=True)
class Invocation:
    """A command line, and the file that is its standard input."""

    words: tuple[str, ...]
    stdin: Path | None = None


@dataclass(slots=True)
class Printed:
    """Where a command's output goes."""

    out: int
    err: int

    @classmethod
    def open(cls) -> Printed:
        return cls(os.memfd_create("out"), os.memfd_create("err"))

    def read(self) -> tuple[str, str]:
        """What was printed; closes both."""
        texts = []
        for file in (self.out, self.err):
            texts.append(os.pread(file, 1 << 20, 0).decode(errors="replace"))
            os.close(file)
        return texts[0], texts[1]


def fork(invocation: Invocation, printed: Printed, prepare: Callable[[], None]) -> int:
    """Start the command in a fork; `prepare` runs in it first. Returns its process id."""
    child = os.fork()
    if child == 0:
        _be(invocation, printed, prepare)
    return child


def _be(invocation: Invocation, printed: Printed, prepare: Callable[[], None]) -> NoReturn:
    status = _TRACEBACK
    try:
        signal.alarm(PATIENCE_SECONDS)
        os.setpgid(0, 0)
        _redirect(invocation.stdin, printed)
        prepare()
        status = _main._run(list(invocation.words))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _redirect(stdin: Path | None, printed: Printed) -> None:
    os.dup2(os.open(stdin or os.devnull, os.O_RDONLY), 0)
    os.dup2(printed.out, 1)
    os.dup2(printed.err, 2)
    # Whatever the parent had made of them.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def spawn(invocation: Invocation, printed: Printed) -> subprocess.Popen[bytes]:
    """Start the real program, in a process group of its own."""
    with (invocation.stdin or Path(os.devnull)).open("rb") as stdin:
        return subprocess.Popen(
            [PROGRAM, *invocation.words],
            stdin=stdin,
            stdout=printed.out,
            stderr=printed.err,
            start_new_session=True,
        )


def must(store: Path, *words: str) -> str:
    """Run a command that nothing happens to and that has to succeed; returns what it printed."""
    printed = Printed.open()
    child = fork(Invocation(("--store", str(store), *words)), printed, lambda: None)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, err = printed.read()
    if status or err:
        raise CommandFailedError(words, status, err)
    return out


def compacts() -> bool:
    """Whether this release's gc can give space back to the file system."""
    printed = Printed.open()
    os.waitpid(fork(Invocation(("gc", "--help")), printed, lambda: None), 0)
    return "--compact" in printed.read()[0]


class CommandFailedError(Exception):
    """A command that had no reason to fail did."""

    def __init__(self, words: tuple[str, ...], status: int, err: str) -> None:
        super().__init__(f"{' '.join(words)}: status {status}: {err.strip()}")
        self.status = status
        self.err = err


def in_fork(call: Callable[[], str]) -> str:
    """The result of `call`, made in a fork: what opens a store, has threads, or may crash.

    Raises RuntimeError with the child's traceback, or with the signal that ended it.
    """
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(PATIENCE_SECONDS)
                text = call()
                status = 0
            except BaseException:
                text = traceback.format_exc()
            os.write(answer.fileno(), text.encode())
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        text = os.pread(answer.fileno(), os.fstat(answer.fileno()).st_size, 0).decode()
    if status:
        raise RuntimeError(text or f"ended by signal {-status}")
    return text
