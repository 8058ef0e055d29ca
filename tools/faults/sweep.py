"""Runs every scenario once for every kind of fault and every call that it can strike, in an order
that a seed decides, so that any part of a sweep is a fair sample of it.

After a fault the command has either failed, with status 1 and one line, and changed nothing that
anybody sees; or it has done without what failed, and its effect is there. The store is sound, every
image byte for byte what it was. The same command then succeeds, and after a gc nothing is left
over.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from tools.crashes import corpus, program
from tools.crashes.model import InvariantError, Model
from tools.crashes.observed import Observed, observe
from tools.faults import injection
from tools.faults.injection import KINDS, Kind, Struck
from tools.faults.scenarios import Scenario, build


@dataclass(frozen=True, slots=True)
class Point:
    """The `number`-th call (from 1) that a kind of fault can strike in a scenario."""

    scenario: Scenario
    kind: Kind
    number: int


@dataclass(slots=True)
class Figures:
    """What was done. Of the `points` that there are, faults were injected by kind and by command,
    of which some commands `failed` cleanly and others did without what failed (`endured`); `missed`
    calls that this run of the command did not make. All were run again and `retried` with
    success. `bytes` were compared."""

    seed: int
    seconds: float = 0.0
    points: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    endured: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    retried: int = 0
    bytes: int = 0

    @property
    def faults_in_all(self) -> int:
        return sum(self.faults.values())

    def document(self) -> dict[str, object]:
        """All of it, for JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {"faults_in_all": self.faults_in_all}


class PromiseBrokenError(Exception):
    """A promise is broken; the message says how, and where everything is kept."""


class Sweep:
    """Works in `work`; what a failure is about goes to a new directory in `keep` (default: TMPDIR).
    `only` names scenarios, default: all."""

    def __init__(
        self,
        seed: int,
        work: Path,
        say: Callable[[str], None],
        keep: Path | None = None,
        only: tuple[str, ...] = (),
    ) -> None:
        self.figures = Figures(seed)
        self.broken: list[str] = []
        self._work = work.resolve()
        self._say = say
        self._kept = keep
        self._run = self._work / "run"
        self._sources = corpus.build(self._work / "sources")
        scenarios = build(self._sources, self._work / "states", self._run)
        self._scenarios = [s for s in scenarios if not only or s.name in only]

    def run(
        self,
        *,
        points: int = 1 << 40,
        seconds: float = 1e9,
        on_broken: Callable[[str], None] | None = None,
    ) -> None:
        """Inject until `points` or `seconds` are reached, or every point has been.

        Raises PromiseBrokenError, unless `on_broken` takes what it would say.
        """
        begin = said = time.monotonic()
        every = self._points()
        self.figures.points = len(every)
        for number, point in enumerate(every[:points]):
            try:
                self._inject(point)
            except (InvariantError, program.CommandFailedError, RuntimeError) as error:
                if on_broken is None:
                    raise PromiseBrokenError(self._keep(point, str(error))) from error
                on_broken(f"{point.scenario.name}: {point.kind.name}, call {point.number}: {error}")
            now = time.monotonic()
            self.figures.seconds = now - begin
            if now - said > 15:
                said = now
                self._say(f"{number + 1} of {len(every)} points, {self.figures.seconds:.0f} s")
            if self.figures.seconds > seconds:
                return

    def _points(self) -> list[Point]:
        """Every point, as far as a run without a fault tells: first one of each command and kind of
        fault, then a second of each, and so on; among those in the order of the seed."""
        source = random.Random(self.figures.seed)
        found: list[tuple[int, float, Point]] = []
        for scenario in self._scenarios:
            untouched = self._strike(Point(scenario, KINDS[0], 0))
            if untouched.status or untouched.err:
                raise program.CommandFailedError(scenario.words, untouched.status, untouched.err)
            for kind in KINDS:
                numbers = list(range(1, untouched.could[kind] + 1))
                source.shuffle(numbers)
                for rank, number in enumerate(numbers):
                    found.append((rank, source.random(), Point(scenario, kind, number)))
        return [point for _, _, point in sorted(found, key=lambda each: each[:2])]

    def _strike(self, point: Point) -> Struck:
        """Run a scenario's command on a fresh copy of its state, with the fault."""
        shutil.rmtree(self._run, ignore_errors=True)
        shutil.copytree(point.scenario.state, self._run)
        return injection.run(self._invocation(point.scenario), point.kind, point.number, self._work)

    def _invocation(self, scenario: Scenario) -> program.Invocation:
        return program.Invocation(
            ("--store", str(self._run / "store"), *scenario.words), scenario.stdin
        )

    # --- one point ---

    def _inject(self, point: Point) -> None:
        scenario = point.scenario
        struck = self._strike(point)
        if struck.call is None:
            self.figures.missed += 1
            return
        try:
            self._judge(scenario, struck)
            self._retry(scenario, done=struck.status == 0)
        except (InvariantError, program.CommandFailedError, RuntimeError) as error:
            raise InvariantError(
                f"{error}\nstruck: {struck.call}; status {struck.status}: {struck.err.strip()}"
            ) from error
        self.figures.faults[point.kind.name] += 1
        self.figures.commands[scenario.name] += 1
        self.figures.failed += struck.status != 0
        if not struck.status:
            self.figures.endured[struck.call.split()[0]] += 1

    def _judge(self, scenario: Scenario, struck: Struck) -> None:
        """The command and what it left, right after the fault."""
        done = struck.status == 0
        if done and struck.err:
            raise InvariantError("it said something on standard error, and reported success")
        if not done:
            _require_one_line(struck, findings=scenario.words[0] == "check")
        if scenario.target:
            self._judge_target(scenario, done=done)
        if (scenario.wounded or scenario.creates) and not done:
            return
        observed = observe(self._run / "store")
        now = {name: name in observed.images for name in scenario.effect}
        whole = {name: key is not None for name, key in scenario.effect.items()}
        if scenario.effect and done != (now == whole):
            raise InvariantError(f"reported {'done' if done else 'failed'}, but names are {now}")
        self._hold(scenario, done=done, observed=observed)

    def _judge_target(self, scenario: Scenario, *, done: bool) -> None:
        name, key = scenario.target or ("", "")
        target = self._run / name
        if target.exists():
            if corpus.sha256(target) != self._sources[key].sha256:
                raise InvariantError(f"the exported {name} differs from {key}")
        elif done:
            raise InvariantError("reported done, but there is no file")

    def _retry(self, scenario: Scenario, *, done: bool) -> None:
        """The same command once more, without a fault, unless it is done for good; and a gc."""
        store = self._run / "store"
        # A read-only file system may have kept an init from taking a whole store back.
        is_there = scenario.creates and (store / "data.mdb").exists()
        if not (done and scenario.once) and not is_there:
            self._must(scenario)
        self.figures.retried += 1
        program.must(store, "gc")
        observed = observe(store)
        if observed.leftovers:
            raise InvariantError(f"temporary files after gc: {observed.leftovers}")
        self._hold(scenario, done=True, observed=observed)

    def _must(self, scenario: Scenario) -> None:
        again = injection.run(self._invocation(scenario), KINDS[0], 0, self._work)
        if again.status or again.err:
            raise InvariantError(f"again, without a fault: status {again.status}: {again.err}")

    def _hold(self, scenario: Scenario, *, done: bool, observed: Observed) -> None:
        names = scenario.after() if done else scenario.held
        images = observed.images
        if scenario.wounded:  # a rebuild may bring back names that were removed (docs/format.md)
            images = {name: digest for name, digest in images.items() if name in names}
        # Temporary files are gc's business.
        seen = replace(observed, images=images, leftovers=[])
        self.figures.bytes += Model(self._sources, dict(names)).hold_against(seen)

    def _keep(self, point: Point, reason: str) -> str:
        place = Path(tempfile.mkdtemp(prefix="fault-loop-failure-", dir=self._kept))
        shutil.copytree(self._run, place / "run")
        return (
            f"{point.scenario.name}: {point.kind.name}, call {point.number}: {reason}\n"
            f"seed {self.figures.seed}\nkept: {place}"
        )


def _require_one_line(struck: Struck, *, findings: bool) -> None:
    """Status 1 and one line on standard error; a check may instead report findings."""
    if struck.status != 1:
        raise InvariantError(f"status {struck.status}")
    lines = struck.err.splitlines()
    if findings and not lines and struck.out:
        return
    if len(lines) != 1 or not lines[0].startswith("dedupstore: "):
        raise InvariantError(f"{len(lines)} lines instead of one")
