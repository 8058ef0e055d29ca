"""Decides, by a seeded generator, what a round does: which commands, and when each is killed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tools.crashes import far, program
from tools.crashes.instants import After, AtCall, Instant, Never
from tools.crashes.model import Command, Model

NAMES_MAX = 12
# Of the commands: let go on to the end (a store in which everything is killed stays empty), or run
# as the real program.
_SPARED_SHARE = 0.12
_SPAWNED_SHARE = 0.08
_COUNTED_SHARE = 0.5
# Of the rounds: with several processes on the store.
_CROWD_SHARE = 0.4
_CROWD = (2, 3, 4)
# Kills fall into a command's usual time, or number of calls, and somewhat beyond.
_BEYOND = 1.05
# What a process stands still for before it is killed at a call: others come to wait for its locks.
_LINGER_SECONDS = (0.0, 0.0, 0.02, 0.1)

WEIGHTS_OF_KILLED = {
    "import": 36, "clone": 8, "rename": 8, "rm": 12, "gc": 15, "compact": 8, "check": 3,
    "export": 6, "repair": 6, "serve": 6, "pull": 8, "lazy": 12, "evict": 10,
}  # fmt: skip
# Those that write to the disk.
WEIGHTS_OF_RECORDED = {
    "import": 36, "clone": 8, "rename": 8, "rm": 12, "gc": 12, "compact": 8,
}  # fmt: skip


@dataclass(slots=True)
class Spans:
    """How long commands usually take, in seconds and counted calls, learnt from those that came to
    their end."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, float] = field(default_factory=dict)

    def learn(self, label: str, seconds: float | None, calls: int | None) -> None:
        for known, value in ((self.seconds, seconds), (self.calls, calls)):
            if value is not None:
                known[label] = 0.7 * known.get(label, value) + 0.3 * value


@dataclass(frozen=True, slots=True)
class Planned:
    """A command, how it is run, and when it is killed."""

    command: Command
    instant: Instant
    spawned: bool


class Planner:
    """Plans rounds for one store."""

    def __init__(
        self, model: Model, exports: Path, spans: Spans, weights: Mapping[str, int]
    ) -> None:
        self._model = model
        self._exports = exports
        self._spans = spans
        self._weights = dict(weights)
        if not program.compacts():
            del self._weights["compact"]
        self._number = 0

    def round(self, source: random.Random) -> list[Planned]:
        """What happens at once in the next round. Commands do not touch each other's names, so that
        the effect of each can be told."""
        crowd = source.choice(_CROWD) if source.random() < _CROWD_SHARE else 1
        taken: set[str] = set()
        planned: list[Planned] = []
        while len(planned) < crowd:
            command = self._command(source, taken, alone=crowd == 1)
            if command is None:
                continue
            taken |= command.touches
            planned.append(self._plan(source, command, in_company=crowd > 1))
        return planned

    def _plan(self, source: random.Random, command: Command, *, in_company: bool) -> Planned:
        spawned = command.kind not in {"serve", "repair"} and source.random() < _SPAWNED_SHARE
        label = f"{command.label}, spawned" if spawned else command.label
        counted = not spawned and command.kind != "serve" and source.random() < _COUNTED_SHARE
        seconds, calls = self._spans.seconds.get(label), self._spans.calls.get(label)
        instant: Instant = Never(counted)
        if source.random() >= _SPARED_SHARE:
            if counted and calls is not None:
                number = source.randint(1, int(calls * _BEYOND) + 1)
                linger = source.choice(_LINGER_SECONDS) if in_company else 0.0
                instant = AtCall(number, source.random() < 0.5, linger)
            elif not counted and seconds is not None:
                instant = After(source.uniform(0, seconds * _BEYOND))
        return Planned(command, instant, spawned)

    def _command(self, source: random.Random, taken: set[str], *, alone: bool) -> Command | None:
        """A command; None if the one that was drawn is not possible now."""
        kinds = list(self._weights)
        kind = source.choices(kinds, list(self._weights.values()))[0]
        free = sorted(set(self._model.names) - taken)
        if kind in {"gc", "check"}:
            return Command(kind, (kind,), label=kind)
        if kind == "compact":
            return Command(kind, ("gc", "--compact"), label=kind)
        if kind == "repair":
            # Damages the store first, which is nothing to do to others.
            return Command(kind, ("check", "--repair"), label=kind) if alone and free else None
        if kind == "evict":
            return Command(kind, ("evict", "0"), label=kind)
        if kind in {"pull", "lazy"}:
            return self._pull(source, kind) if len(self._model.names) < NAMES_MAX else None
        if kind == "import":
            return self._import(source) if len(self._model.names) < NAMES_MAX else None
        if not free:
            return None
        name = source.choice(free)
        key = self._model.names[name]
        if kind == "rm":
            gone = source.sample(free, min(len(free), source.choice((1, 1, 2, 3))))
            return Command(kind, ("rm", *gone), dict.fromkeys(gone), label=kind)
        if kind == "export":
            target = self._exports / f"export{self._next()}"
            words = ("export", name, str(target))
            return Command(
                kind, words, uses=frozenset({name}), exports=(target, key), label=f"{kind} {key}"
            )
        if kind == "serve":
            return Command(kind, (), uses=frozenset(free[:3]), label=kind)
        if kind == "rename":
            new = f"{key}.renamed{self._next()}"
            return Command(kind, ("rename", name, new), {name: None, new: key}, label=kind)
        if len(self._model.names) >= NAMES_MAX:
            return None
        new = f"{key}.clone{self._next()}"
        words = ("clone", name, new)
        return Command(kind, words, {new: key}, frozenset({name}), label=kind)

    def _import(self, source: random.Random) -> Command:
        key = source.choice(sorted(self._model.sources))
        origin = self._model.sources[key]
        name = f"{key}.{self._next()}"
        if origin.streamed:
            words: tuple[str, ...] = ("import", "-", name)
        else:
            reread = ("--reread",) if source.random() < 0.6 else ()
            words = ("import", str(origin.path), name, *reread)
        stdin = origin.path if origin.streamed else None
        return Command("import", words, {name: key}, stdin=stdin, label=f"import {key}")

    def _pull(self, source: random.Random, kind: str) -> Command:
        key = source.choice(sorted(self._model.sources))
        name = f"{key}.{self._next()}"
        words = ("pull", far.NAME, key, "--as", name, *(("--lazy",) if kind == "lazy" else ()))
        return Command(kind, words, {name: key}, label=f"{kind} {key}")

    def _next(self) -> int:
        self._number += 1
        return self._number
