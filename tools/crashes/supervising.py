"""Runs a planned command in a process of its own that waits for it and kills it, so that several
can run, and be traced, at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.crashes import instants, program, serving, tracing
from tools.crashes.instants import After, Ended
from tools.crashes.plans import Planned

SERVE_SECONDS = 0.6
"""How long a server lives that is not killed earlier."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a planned command ended."""

    ended: Ended
    out: str
    err: str
    served: serving.Served | None = None

    @property
    def done(self) -> bool:
        """Whether it reported that it is done."""
        return self.ended.status == 0 or (self.ended.status is None and bool(self.out))


@dataclass(frozen=True, slots=True)
class Supervised:
    """A supervisor: its process id, and the pipe on which it will tell."""

    process: int
    answer: int

    def collect(self) -> Result:
        """Wait for the end. Raises RuntimeError: the supervisor itself has failed."""
        with open(self.answer, encoding="utf-8") as answer:
            text = answer.read()
        os.waitpid(self.process, 0)
        if not text:
            raise RuntimeError("a supervisor died")
        told = json.loads(text)
        served = serving.Served(**told["served"]) if told["served"] else None
        return Result(Ended(**told["ended"]), told["out"], told["err"], served)


def start(planned: Planned, store: Path, served: Mapping[str, str], seed: str) -> Supervised:
    """Start a supervisor; a server's clients read the images `served` (name -> SHA-256)."""
    read, write = os.pipe()
    supervisor = os.fork()
    if supervisor:
        os.close(write)
        return Supervised(supervisor, read)
    try:
        signal.alarm(2 * program.PATIENCE_SECONDS)
        result = _supervise(planned, store, served, seed)
        os.write(write, json.dumps(asdict(result)).encode())
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _supervise(planned: Planned, store: Path, served: Mapping[str, str], seed: str) -> Result:
    command, instant = planned.command, planned.instant
    if command.kind == "serve":
        after = instant.seconds if isinstance(instant, After) else SERVE_SECONDS
        report = serving.serve(store, served, after, seed)
        return Result(Ended(None, report.seconds, None), "", "", report)
    words = ("--store", str(store), *command.words)
    invocation = program.Invocation(words, command.stdin)
    printed = program.Printed.open()
    if planned.spawned:
        process = program.spawn(invocation, printed)
        ended = instants.await_end(process.pid, instant)
        _await_group(process.pid)
    else:
        traced = instants.is_traced(instant)
        prepare = tracing.ask_for_tracing if traced else lambda: None
        ended = instants.await_end(program.fork(invocation, printed, prepare), instant)
    return Result(ended, *printed.read())


def _await_group(leader: int) -> None:
    """Wait until the whole process group has ended: the command is a child of what was killed."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return
        time.sleep(0.001)
    os.killpg(leader, signal.SIGKILL)
    raise RuntimeError("a command outlived the program that was killed")
