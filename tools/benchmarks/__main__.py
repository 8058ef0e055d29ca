"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

from tools.benchmarks import corpus, ingest, reads
from tools.benchmarks.report import Report

SUITES = {"space": ingest.space, "ingest": ingest.ingest, "reads": reads.warm, "clone": reads.clone}


def main() -> int:
    """Run the chosen suites and print one table; returns the exit status."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dedupstore-bench"
    parser = argparse.ArgumentParser(prog="tools/bench", description="Benchmarks against others.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of: {', '.join(SUITES)}")
    parser.add_argument("--corpus", type=Path, default=cache, help="three images; built if absent")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of each comparison")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    options = parser.parse_args()
    unknown = [suite for suite in options.suites if suite not in SUITES]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)} (there are {', '.join(SUITES)})")
    images = corpus.images(options.corpus)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="dedupbench-", dir=options.corpus) as work:
        for suite in options.suites or SUITES:
            SUITES[suite](images, Path(work), options.rounds, report)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}")
    report.print()
    if options.json:
        options.json.write_text(json.dumps(report.raw, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
