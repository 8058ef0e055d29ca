"""The curves of a report as PNG files, one for each plot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib as mpl

from tools.benchmarks.report import Curve

mpl.use("Agg")  # no display
from matplotlib import pyplot

_LOG_SPAN = 20  # an axis that spans more than this factor is logarithmic


def draw(curves: Sequence[Curve], directory: Path) -> list[Path]:
    """Write the plots of `curves` into `directory`, made if need be; return their files."""
    directory.mkdir(parents=True, exist_ok=True)
    ordered = sorted(curves, key=lambda curve: curve.plot)
    return [
        _draw(plot, list(members), directory)
        for plot, members in groupby(ordered, key=lambda curve: curve.plot)
    ]


def _draw(plot: str, curves: list[Curve], directory: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for curve in curves:
        theirs = "dedupstore" not in curve.label and not curve.label.startswith("ours")
        axes.plot(curve.x, curve.y, "o--" if theirs else "o-", label=curve.label, markersize=4)
    axes.set(title=plot, xlabel=curves[0].x_label, ylabel=curves[0].y_label)
    if _spans([x for curve in curves for x in curve.x]):
        axes.set_xscale("log", base=2)
    if _spans([y for curve in curves for y in curve.y]):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    target = directory / (re.sub(r"[^a-z0-9]+", "-", plot.lower()).strip("-") + ".png")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _spans(values: Sequence[float]) -> bool:
    """Whether values are so far apart that only a logarithm shows them all."""
    return min(values) > 0 and max(values) > _LOG_SPAN * min(values)
