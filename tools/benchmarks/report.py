"""Measured figures: kept raw, shown as ratios of medians."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping


class Report:
    """Collects one row per comparison."""

    def __init__(self) -> None:
        self.raw: list[dict[str, object]] = []
        self._rows: list[tuple[str, str, str, str, str, str]] = []

    def add(
        self,
        what: str,
        unit: str,
        figures: Mapping[str, list[float]],
        *,
        target: str = "",
        lower_is_better: bool = False,
    ) -> float:
        """Add a comparison of `ours` with each other key; return the first ratio.

        The ratio is ours / theirs, or theirs / ours where less is better: above 1 is better.
        """
        self.raw.append({"what": what, "unit": unit, "figures": dict(figures)})
        ours = statistics.median(figures["ours"])
        ratios = []
        for name, values in figures.items():
            if name == "ours":
                continue
            theirs = statistics.median(values)
            ratio = theirs / ours if lower_is_better else ours / theirs
            ratios.append(ratio)
            row = (what, f"{ours:,.1f}", name, f"{theirs:,.1f}", unit, f"{ratio:.2f} {target}")
            self._append(row)
        return ratios[0] if ratios else 0.0

    def note(self, what: str, value: str, target: str = "") -> None:
        """Add a figure that is compared with a target only."""
        self.raw.append({"what": what, "value": value})
        self._append((what, value, "", "", "", target))

    def _append(self, row: tuple[str, str, str, str, str, str]) -> None:
        """Keep a row, and show at once what a long run has found so far."""
        self._rows.append(row)
        print("  ".join(filter(None, row)), file=sys.stderr, flush=True)

    def print(self) -> None:
        """Print the rows as a table."""
        head = ("what", "dedupstore", "other", "its", "unit", "ratio (better above 1)")
        rows = [head, *self._rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        for row in rows:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def alternate(rounds: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run each callable once per round, in turn; return the figures by name."""
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            figures[name].append(run())
    return figures
