"""Makes system calls of dedupstore's commands fail, every one that can, and holds the store against
a model after each: tools/fault_loop [--points N] [--seconds S] [--seed N] [--only COMMAND]...
[--json FILE].

A point is a command, a kind of fault (`faults.injection` has them: full disk, quota, short write,
I/O error, and a file system that turns read-only after one) and the number of the call that it
strikes, among the command's calls about the store's, the source's and the target's files. After
each the command has failed with status 1 and one line, and nothing has changed; or it has done
without what failed, and is done. The store is sound, every image byte for byte its source, the same
command succeeds without the fault, and gc leaves no temporary file.

All points in one run: without --points and --seconds. The result means nothing about errors of
pages that are read or written through the page cache (tests/fault/test_bad_disk.py has a disk that
fails below a real file system), nor about two faults that have nothing to do with each other.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.faults.sweep import Figures, PromiseBrokenError, Sweep


def main() -> int:
    """Run the sweep; returns the exit status: 1 if the store broke a promise."""
    parser = argparse.ArgumentParser(prog="tools/fault_loop", description=__doc__.split("\n\n")[0])
    parser.add_argument("--points", type=int, default=1 << 40, help="stop after this many")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--only", action="append", default=[], help="a command; may be repeated")
    parser.add_argument("--directory", type=Path, help="where stores are made; default: TMPDIR")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fault-loop-", dir=options.directory) as work:
        sweep = Sweep(
            options.seed,
            Path(work),
            lambda line: print(line, flush=True),
            only=tuple(options.only),
        )
        try:
            sweep.run(points=options.points, seconds=options.seconds)
        except PromiseBrokenError as failure:
            print(f"tools/fault_loop: {failure}", file=sys.stderr)
            return 1
    print("\n".join(_lines(sweep.figures)))
    if options.json:
        options.json.write_text(json.dumps(sweep.figures.document(), indent=2) + "\n")
    return 0


def _lines(figures: Figures) -> list[str]:
    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))

    return [
        f"{figures.faults_in_all} faults at {figures.points} points, {figures.seconds:.0f} s; "
        "nothing was lost, nothing half done",
        f"by kind: {listed(figures.faults)}",
        f"by command: {listed(figures.commands)}",
        f"failed in one line: {figures.failed}; did without the call: {listed(figures.endured)}",
        f"succeeded afterwards: {figures.retried}; compared: {figures.bytes >> 20} MiB",
    ]


if __name__ == "__main__":
    sys.exit(main())
