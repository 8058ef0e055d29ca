"""Power loss: commands on a recorded disk, and the store on every kind of disk that a loss of power
may leave, held against the model of what had been reported by then.

What a command reports lies at a position in the disk's log: the number of operations that the disk
had done when the command had ended. A crash at that position or later must have its effect, also if
all that was written since the last flush is lost.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path

import lmdb

from tools.crashes import corpus, disk, program
from tools.crashes.model import Command, InvariantError, Model
from tools.crashes.observed import observe
from tools.crashes.plans import WEIGHTS_OF_RECORDED, Planner, Spans
from tools.crashes.states import KINDS, NOTHING_TO_LOSE, Disks, Recording


@dataclass(frozen=True, slots=True)
class Event:
    """A command, and the positions at which it began and had ended."""

    command: Command
    began: int
    ended: int


@dataclass(slots=True)
class Figures:
    """What was done. `states` by which of the writes since the last flush were there; `unfinished`
    commands were met in them, of which `whole` had taken effect; `bytes` were compared."""

    seed: int
    seconds: float = 0.0
    recordings: int = 0
    commands: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    flushes: int = 0
    states: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0
    whole: int = 0
    bytes: int = 0

    @property
    def states_in_all(self) -> int:
        return sum(self.states.values())

    def document(self) -> dict[str, object]:
        """All of it, for JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {"states_in_all": self.states_in_all}


class PromiseBrokenError(Exception):
    """A promise is broken; the message says where everything is kept."""


class Outages:
    """Records commands, and cuts the power. `prepare` runs in each command's process first."""

    def __init__(
        self,
        seed: int,
        work: Path,
        say: Callable[[str], None],
        prepare: Callable[[], None] = lambda: None,
        keep: Path | None = None,
    ) -> None:
        self.figures = Figures(seed)
        self._work = work
        self._say = say
        self._prepare = prepare
        self._kept = keep
        self._sources = corpus.build(work / "sources")

    def run(
        self, *, commands: int, states: int, recordings: int = 1 << 30, seconds: float = 1e9
    ) -> None:
        """Record `commands` and look at `states` of their disk, again and again until `recordings`
        are made or `seconds` over. Raises PromiseBrokenError, DiskError."""
        begin = time.monotonic()
        while self.figures.recordings < recordings and self.figures.seconds < seconds:
            number = self.figures.recordings
            with tempfile.TemporaryDirectory(prefix="outage", dir=self._work) as directory:
                work = Path(directory)
                source = random.Random(f"{self.figures.seed}/{number}")
                events = self._record(work, commands, source)
                self._replay(work, events, states, source, begin + seconds)
            self.figures.recordings += 1
            self.figures.seconds = time.monotonic() - begin
            self._say(
                f"recording {number}: {self.figures.states_in_all} states, "
                f"{self.figures.seconds:.0f} s"
            )

    # --- recording ---

    def _record(self, work: Path, commands: int, source: random.Random) -> list[Event]:
        events: list[Event] = []
        with disk.recorded(work) as recorded:
            store = recorded.root / "store"
            model = Model(self._sources)
            planner = Planner(model, work, Spans(), WEIGHTS_OF_RECORDED)
            events += self._run(recorded, store, [Command("init", ("init",))])
            while len(events) < commands:
                planned = [plan.command for plan in planner.round(source)]
                ran = self._run(recorded, store, planned)
                for event in ran:
                    model.apply(event.command)
                events += ran
        recording = Recording(work / "log")
        self.figures.commands.update(event.command.kind for event in events)
        self.figures.operations += len(recording.operations)
        self.figures.flushes += len(recording.flushes)
        return events

    def _run(
        self, recorded: disk.RecordedDisk, store: Path, commands: list[Command]
    ) -> list[Event]:
        """Run commands beside each other; the events in the order in which they ended."""
        running: dict[int, tuple[Command, int, program.Printed]] = {}
        for command in commands:
            printed = program.Printed.open()
            words = ("--store", str(store), *command.words)
            began = recorded.position()
            child = program.fork(program.Invocation(words, command.stdin), printed, self._prepare)
            running[child] = command, began, printed
        events = []
        while running:
            child, status = os.wait()
            ended = recorded.position()
            if child not in running:
                continue
            command, began, printed = running.pop(child)
            _, err = printed.read()
            if status or err:
                raise program.CommandFailedError(command.words, status, err)
            events.append(Event(command, began, ended))
        return events

    # --- replay ---

    def _replay(
        self,
        work: Path,
        events: list[Event],
        states: int,
        source: random.Random,
        deadline: float,
    ) -> None:
        recording = Recording(work / "log")
        disks = Disks(recording, disk.DISK_BYTES)
        for position, chosen in _crashes(recording, events, states, source):
            if time.monotonic() > deadline:
                return
            kind = chosen if disks.volatile(position) else NOTHING_TO_LOSE
            (work / "disk").write_bytes(disks.state(position, kind, source))
            try:
                with disk.mounted(work / "disk", work / "root"):
                    self._hold(work / "root", events, position)
            except (InvariantError, RuntimeError) as error:
                kept = self._keep(work, events, position, kind, str(error))
                raise PromiseBrokenError(kept) from error
            except disk.DiskError as error:  # which may be our disks' fault, or a lost file system
                raise disk.DiskError(
                    self._keep(work, events, position, kind, str(error))
                ) from error
            self.figures.states[kind] += 1

    def _hold(self, root: Path, events: list[Event], position: int) -> None:
        """Compare a store with what had been reported by `position`."""
        store = root / "store"
        if events[0].ended > position:
            _refuses_or_works(store)
            return
        model = Model(self._sources)
        done = sorted((e for e in events[1:] if e.ended <= position), key=lambda e: e.ended)
        for event in done:
            model.apply(event.command)
        observed = observe(store)
        if observed.findings:
            raise InvariantError(f"check: {'; '.join(observed.findings[:5])}")
        for event in events[1:]:
            if event.began <= position < event.ended:
                self.figures.unfinished += 1
                effect = model.settle(event.command, done=False, observed=observed)
                self.figures.whole += effect and bool(event.command.effect)
        self.figures.bytes += model.hold_against(observed)

    def _keep(self, work: Path, events: list[Event], position: int, kind: str, reason: str) -> str:
        place = Path(tempfile.mkdtemp(prefix="power-loss-failure-", dir=self._kept))
        shutil.copy(work / "disk", place / "disk")  # after its journal was replayed
        shutil.copytree(work / "log", place / "log")
        story = {
            "seed": self.figures.seed,
            "recording": self.figures.recordings,
            "position": position,
            "kind": kind,
            "reason": reason,
            "events": [[e.began, e.ended, e.command.words] for e in events],
        }
        (place / "story.json").write_text(json.dumps(story, indent=2) + "\n")
        return (
            f"{reason}\nseed {self.figures.seed}, recording {self.figures.recordings}, crash after "
            f"operation {position}, writes since the last flush: {kind}\nkept: {place}"
        )


def _crashes(
    recording: Recording, events: list[Event], states: int, source: random.Random
) -> list[tuple[int, str]]:
    """(position, kind) of the crashes to look at, in order. A third each: when a command has just
    reported, before a flush, when there is most to lose, and anywhere between flushes."""
    begin = events[0].began
    reports = [event.ended for event in events]
    ends = [*recording.flushes, len(recording.operations) + 1]
    # Where there is something to lose: not right behind a flush.
    spans = [range(max(flush + 1, begin), end) for flush, end in pairwise(ends)]
    flushes = [span[-1] for span in spans if span]
    anywhere = [position for span in spans for position in span]
    chosen = []
    for number in range(states):
        position = source.choice((reports, flushes, anywhere)[number % 3])
        # What was reported must survive the loss of everything else.
        kind = "none" if number % 6 == 0 else source.choice(KINDS)
        chosen.append((position, kind))
    return sorted(chosen)


def without_syncs() -> None:
    """Make LMDB's commits not durable, in this process: the control."""
    lmdb.open = functools.partial(lmdb.open, sync=False, metasync=False)


def _refuses_or_works(store: Path) -> None:
    """A store whose init had not reported: commands work, or say in one line why not."""
    if not store.exists():
        return
    try:
        program.must(store, "ls")
    except program.CommandFailedError as error:
        if error.status != 1 or len(error.err.splitlines()) != 1:
            raise InvariantError(f"unfinished init: {error}") from error
