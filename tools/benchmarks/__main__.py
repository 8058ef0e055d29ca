"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools.benchmarks import (
    clones,
    cold,
    connections,
    corpus,
    mounted,
    ondemand,
    plots,
    policy,
    scaling,
    scaling_chunks,
    serving,
    storing,
)
from tools.benchmarks.report import Bench, Report

SUITES: dict[str, Callable[[Bench], None]] = {
    "space": storing.space,
    "import": storing.ingest,
    "known": storing.known,
    "export": storing.export,
    "warm": serving.warm,
    "sweep": serving.sweep,
    "clones": clones.clones,
    "cold": cold.cold,
    "mounted": mounted.mounted,
    "scaling-images": scaling.images,
    "scaling-chunks": scaling_chunks.chunks,
    "scaling-connections": connections.connections,
    "policy": policy.policy,
    "ondemand": ondemand.ondemand,
    "ondemand-others": ondemand.others,
    "ondemand-links": ondemand.links,
}


def main() -> int:
    """Run the chosen suites and print one table; returns the exit status."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dedupstore-bench"
    parser = argparse.ArgumentParser(prog="tools/bench", description="Benchmarks against others.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of: {', '.join(SUITES)}")
    parser.add_argument("--corpus", type=Path, default=cache, help="three images; built if absent")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of each comparison")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--plots", type=Path, help="write the curves into this directory, as PNG")
    options = parser.parse_args()
    unknown = [suite for suite in options.suites if suite not in SUITES]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)} (there are {', '.join(SUITES)})")
    images = corpus.images(options.corpus)
    report = Report()
    failed = False
    for suite in options.suites or SUITES:
        report.suite = suite
        with tempfile.TemporaryDirectory(prefix="dedupbench-", dir=options.corpus) as work:
            try:
                SUITES[suite](Bench(images, Path(work), options.rounds, report))
            except Exception:  # the figures of the others are worth having
                traceback.print_exc()
                failed = True
    machine = _machine()
    print(f"\n{', '.join(machine.values())}")
    print("\n".join(report.lines()))
    if options.json:
        options.json.write_text(json.dumps(_document(machine, report), indent=2) + "\n")
    if options.plots:
        plots.draw(report.curves, options.plots)
    return int(failed)


def _document(machine: dict[str, str], report: Report) -> dict[str, Any]:
    return {
        "machine": machine,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in report.rows],
        "raw": report.raw,
        "curves": [asdict(curve) for curve in report.curves],
    }


def _machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return {
        "cpu": f"{model} ({platform.machine()}), {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "python": f"Python {platform.python_version()}",
    }


if __name__ == "__main__":
    sys.exit(main())
