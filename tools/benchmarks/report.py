"""Measured figures: kept raw, shown as ratios of medians beside their targets."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Figures = Mapping[str, list[float]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; empty strings where a column does not apply."""

    suite: str
    what: str
    ours: str
    other: str
    theirs: str
    unit: str
    ratio: str
    target: str
    met: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a plot: y over x. Curves of one `plot` are drawn together."""

    plot: str
    label: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(slots=True)
class Report:
    """Collects one row per comparison, every raw figure, and the curves to plot."""

    suite: str = ""
    raw: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def compare(
        self,
        what: str,
        unit: str,
        figures: Figures,
        *,
        targets: Mapping[str, float] | None = None,
        lower_is_better: bool = False,
    ) -> None:
        """Add a comparison of `ours` with every other key of `figures`.

        The ratio is ours / theirs, or theirs / ours where less is better: above 1 is better.
        `targets` says, by key, what the ratio must reach.
        """
        ours = statistics.median(figures["ours"])
        ratios = {}
        for other, values in figures.items():
            if other == "ours":
                continue
            theirs = statistics.median(values)
            ratio = ratios[other] = theirs / ours if lower_is_better else ours / theirs
            target = (targets or {}).get(other)
            self._append(
                what,
                _number(ours),
                other,
                _number(theirs),
                unit,
                f"{ratio:.2f}",
                "" if target is None else f">= {target:g}",
                "" if target is None else ratio >= target,
            )
        self.raw.append(
            {
                "suite": self.suite,
                "what": what,
                "unit": unit,
                "figures": {name: list(values) for name, values in figures.items()},
                "ratios": ratios,
                "targets": dict(targets or {}),
                "lower_is_better": lower_is_better,
            }
        )

    def bound(self, what: str, unit: str, values: Sequence[float], at_most: float) -> None:
        """Add a figure whose median must not exceed a bound."""
        self._limit(what, unit, values, at_most, "<=")

    def floor(self, what: str, unit: str, values: Sequence[float], at_least: float) -> None:
        """Add a figure whose median must reach a bound."""
        self._limit(what, unit, values, at_least, ">=")

    def note(self, what: str, unit: str, values: Sequence[float]) -> None:
        """Add a figure that has no target."""
        self._append(what, _number(statistics.median(values)), unit=unit)
        self.raw.append({"suite": self.suite, "what": what, "unit": unit, "values": list(values)})

    def missing(self, other: str) -> None:
        """Say that a competitor cannot be had here and was left out of the suite."""
        self._append("left out", "", other, "not available")
        self.raw.append({"suite": self.suite, "what": "left out", "other": other})

    def curve(self, curve: Curve) -> None:
        """Add a line to a plot."""
        self.curves.append(curve)

    def _limit(
        self, what: str, unit: str, values: Sequence[float], limit: float, sign: str
    ) -> None:
        median = statistics.median(values)
        met = median <= limit if sign == "<=" else median >= limit
        shown = f"{sign} {_number(limit)}"
        self._append(what, _number(median), unit=unit, target=shown, met=met)
        self.raw.append(
            {
                "suite": self.suite,
                "what": what,
                "unit": unit,
                "values": list(values),
                "limit": shown,
                "met": met,
            }
        )

    def _append(
        self,
        what: str,
        ours: str,
        other: str = "",
        theirs: str = "",
        unit: str = "",
        ratio: str = "",
        target: str = "",
        met: bool | str = "",
    ) -> None:
        """Keep a row, and show at once what a long run has found so far."""
        verdict = met if isinstance(met, str) else ("yes" if met else "NO")
        row = Row(self.suite, what, ours, other, theirs, unit, ratio, target, verdict)
        self.rows.append(row)
        print("  ".join(filter(None, asdict(row).values())), file=sys.stderr, flush=True)

    def lines(self) -> Iterator[str]:
        """The table, in Markdown, which also reads well on a terminal."""
        head = ("what", "dedupstore", "other", "its", "unit", "ratio", "target", "met")
        cells = [head, *(tuple(asdict(row).values())[1:] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        for i, row in enumerate(cells):
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            yield "| " + " | ".join(padded) + " |"
            if i == 0:
                yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


@dataclass(frozen=True, slots=True)
class Bench:
    """What every suite gets: the corpus' images, smallest first, a directory to work in, how many
    times to alternate, and where figures go."""

    images: list[Path]
    work: Path
    rounds: int
    report: Report


def alternate(rounds: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run each callable once per round, in turn; return the figures by name."""
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            figures[name].append(run())
    return figures


def _number(value: float) -> str:
    """Three significant digits or the whole number, whichever is longer."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
