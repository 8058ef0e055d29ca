"""The crash loop: rounds of commands that are killed, each held against the model.

An epoch is a store of its own and some dozens of rounds; at its end the store is compared with a
twin and then emptied. What is planned follows from the seed and the epoch's number; what a kill
hits follows from the machine's timing as well, so a rerun of an epoch is the same plan, not the
same crash. Therefore a failure keeps the store as it was before the round, as it is after, and what
was run.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from tools.crashes import corpus, far, instants, program, twins, wounds
from tools.crashes.model import Command, InvariantError, Model
from tools.crashes.observed import observe
from tools.crashes.plans import WEIGHTS_OF_KILLED, Planned, Planner, Spans
from tools.crashes.supervising import SERVE_SECONDS, Result, start

ROUNDS_PER_EPOCH = 40


@dataclass(slots=True)
class Figures:
    """What was done. `kills` by kind of command; `whole` of those commands had taken effect
    although they had not reported it. `bytes` were compared after kills, `served` by clients
    before."""

    seed: int
    seconds: float = 0.0
    rounds: int = 0
    epochs: int = 0
    commands: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    kills_at_calls: int = 0
    kills_spawned: int = 0
    kills_in_company: int = 0
    whole: int = 0
    bytes: int = 0
    served: int = 0
    pages_over_twin_max: int = 0
    frames_over_twin_max: int = 0
    pages_of_emptied_max: int = 0

    @property
    def kills_in_all(self) -> int:
        return sum(self.kills.values())

    def document(self) -> dict[str, object]:
        """All of it, for JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {"kills_in_all": self.kills_in_all}


class PromiseBrokenError(Exception):
    """An invariant is broken; the message says where everything is kept."""


class Loop:
    """Runs epochs in `work`; what a failure is about goes to a new directory in `keep` (default:
    TMPDIR)."""

    def __init__(
        self, seed: int, work: Path, say: Callable[[str], None], keep: Path | None = None
    ) -> None:
        self.figures = Figures(seed)
        self._work = work
        self._say = say
        self._kept = keep
        self._spans = Spans()
        self._sources = corpus.build(work / "sources")
        self._far = far.build(work, self._sources)

    def run(self, *, epoch: int, rounds: int, seconds: float) -> None:
        """Run until `rounds` or `seconds` are reached, from an epoch on.

        Raises PromiseBrokenError.
        """
        begin = time.monotonic()
        while self.figures.rounds < rounds and self.figures.seconds < seconds:
            count = min(ROUNDS_PER_EPOCH, rounds - self.figures.rounds)
            deadline = begin + seconds
            with tempfile.TemporaryDirectory(prefix="epoch", dir=self._work) as directory:
                _Epoch(
                    epoch,
                    Path(directory),
                    self.figures,
                    self._sources,
                    self._spans,
                    self._kept,
                    self._far,
                ).run(count, deadline)
            epoch += 1
            self.figures.epochs += 1
            self.figures.seconds = time.monotonic() - begin
            self._say(
                f"epoch {epoch - 1}: {self.figures.kills_in_all} kills in "
                f"{self.figures.rounds} rounds, {self.figures.seconds:.0f} s"
            )


class _Epoch:
    """One store's life."""

    def __init__(
        self,
        number: int,
        work: Path,
        figures: Figures,
        sources: dict[str, corpus.Source],
        spans: Spans,
        kept: Path | None,
        far_url: Path,
    ) -> None:
        self._far = far_url
        self._number = number
        self._kept = kept
        self._work = work
        self._figures = figures
        self._spans = spans
        self._store = work / "store"
        self._model = Model(sources)
        self._exports = work / "exports"
        self._exports.mkdir()
        self._planner = Planner(self._model, self._exports, spans, WEIGHTS_OF_KILLED)
        self._planned: list[Planned] = []
        self._results: list[Result] = []

    def run(self, rounds: int, deadline: float) -> None:
        source = random.Random(f"{self._figures.seed}/{self._number}")
        program.must(self._store, "init")
        far.know(self._store, self._far)
        number = 0
        try:
            while number < rounds and (time.monotonic() < deadline or number == 0):
                number += 1
                self._keep_state_before()
                self._planned = self._planner.round(source)
                self._round(f"{self._figures.seed}/{self._number}/{number}")
                self._figures.rounds += 1
            self._planned = self._results = []
            self._close()
        except (InvariantError, program.CommandFailedError, RuntimeError) as error:
            raise PromiseBrokenError(self._keep(number, str(error))) from error

    def _keep_state_before(self) -> None:
        before = self._work / "before"
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(self._store, before)

    # --- a round ---

    def _round(self, seed: str) -> None:
        repairing = self._planned[0].command.kind == "repair"
        if repairing:
            wounds.wound(self._store, seed)
        started = [
            start(planned, self._store, self._served(planned), seed) for planned in self._planned
        ]
        self._results = [supervised.collect() for supervised in started]
        self._count()
        if repairing:
            wounds.heal(self._store, self._model)
        observed = observe(self._store)
        for planned, result in zip(self._planned, self._results, strict=True):
            self._judge(planned, result)
            whole = self._model.settle(planned.command, done=result.done, observed=observed)
            self._figures.whole += whole and not result.done and bool(planned.command.effect)
            self._check_export(planned.command, done=result.done)
        self._figures.bytes += self._model.hold_against(observed)
        for path in self._exports.iterdir():  # a killed export leaves a file of another name
            path.unlink()

    def _served(self, planned: Planned) -> dict[str, str]:
        """Name -> SHA-256 of the images that clients of a server may read."""
        names, sources = self._model.names, self._model.sources
        uses = planned.command.uses if planned.command.kind == "serve" else ()
        return {name: sources[names[name]].sha256 for name in uses}

    def _count(self) -> None:
        for planned, result in zip(self._planned, self._results, strict=True):
            kind, ended = planned.command.kind, result.ended
            label = planned.command.label + (", spawned" if planned.spawned else "")
            self._figures.commands[kind] += 1
            if result.served:
                self._figures.served += result.served.bytes
                self._spans.learn(label, SERVE_SECONDS, None)
            if ended.status is None:
                self._figures.kills[kind] += 1
                self._figures.kills_at_calls += isinstance(planned.instant, instants.AtCall)
                self._figures.kills_spawned += planned.spawned
                self._figures.kills_in_company += len(self._planned) > 1
            elif ended.calls is not None:
                self._spans.learn(label, None, ended.calls)
            else:
                self._spans.learn(label, ended.seconds, None)

    def _judge(self, planned: Planned, result: Result) -> None:
        """A command that was not killed succeeds, and one that was says nothing of errors."""
        if result.served and result.served.wrong:
            raise InvariantError(f"served: {result.served.wrong}")
        allowed = {0, None, 1} if planned.command.kind == "repair" else {0, None}
        if result.ended.status not in allowed or result.err:
            raise InvariantError(
                f"{planned.command.words}: status {result.ended.status}: {result.err}"
            )

    def _check_export(self, command: Command, *, done: bool) -> None:
        """An exported file is there whole or not at all; it need not be unless it was reported."""
        if command.exports is None:
            return
        target, key = command.exports
        if target.exists():
            if corpus.sha256(target) != self._model.sources[key].sha256:
                raise InvariantError(f"exported file of {key} differs")
            self._figures.bytes += target.stat().st_size
        elif done:
            raise InvariantError(f"exported file of {key} is missing")

    # --- the end ---

    def _close(self) -> None:
        ours, theirs = twins.compare(self._store, self._model, self._work, self._far)
        left = twins.empty(self._store, self._model)
        figures = self._figures
        figures.pages_over_twin_max = max(figures.pages_over_twin_max, ours.pages - theirs.pages)
        figures.frames_over_twin_max = max(
            figures.frames_over_twin_max, ours.frames - theirs.frames
        )
        figures.pages_of_emptied_max = max(figures.pages_of_emptied_max, left.pages)

    def _keep(self, number: int, reason: str) -> str:
        """Put what a failure is about aside; returns the message that tells of it."""
        place = Path(tempfile.mkdtemp(prefix="crash-loop-failure-", dir=self._kept))
        for name in ("store", "before", "twin"):
            if (self._work / name).exists():
                shutil.copytree(self._work / name, place / name)
        story = {
            "seed": self._figures.seed,
            "epoch": self._number,
            "round": number,
            "reason": reason,
            "names": self._model.names,
            "history": self._model.history,
            "round_commands": [
                {"words": p.command.words, "instant": repr(p.instant), "spawned": p.spawned}
                for p in self._planned
            ],
            "results": [repr(result) for result in self._results],
        }
        (place / "story.json").write_text(json.dumps(story, indent=2) + "\n")
        return (
            f"{reason}\nseed {self._figures.seed}, epoch {self._number}, round {number}; the same "
            f"plan again: --seed {self._figures.seed} --epoch {self._number} --rounds {number}\n"
            f"kept: {place}"
        )
