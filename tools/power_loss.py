"""Cuts the power between any two writes of a disk with a store on it, thousands of times, and holds
what is left against what commands had reported: tools/power_loss [--seconds S] [--seed N]
[--json FILE].

Commands run on ext4 on a disk that records every write, zeroing, trim and flush in order
(`crashes.recording`, through nbdfuse and a loop device). Then the disk is put together again as it
may be after a crash at some point of that order (`crashes.states`: all that was flushed, and of the
rest any subset of writes, and of their sectors of 512 bytes), mounted, which replays ext4's
journal, and looked at: check finds nothing, the effect of every command that had ended by then is
there and every image byte for byte its source, and an unfinished command's effect is there whole or
not at all. Exported files are not held: they are as durable as what cp writes.

The result means nothing
- about disks that lose what they said was flushed, or that tear a sector of 512 bytes;
- if the recording is not of what the kernel does: if nbdfuse or loop did not pass flushes on, there
  would be none in the log, and everything that was reported would be lost. `--unsafe` is the
  control: it takes LMDB's syncs away, and must fail;
- about other file systems than this kernel's ext4 with its default options, though nothing but
  fsync
  and rename is asked of it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.crashes.disk import DiskError
from tools.crashes.outage import Figures, Outages, PromiseBrokenError, without_syncs


def main() -> int:
    """Record and replay; returns the exit status: 1 if a promise is broken, 2 if the machine cannot
    make or mount the disks."""
    parser = argparse.ArgumentParser(prog="tools/power_loss", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after this time")
    parser.add_argument("--commands", type=int, default=40, help="of each recording")
    parser.add_argument("--states", type=int, default=400, help="to look at of each recording")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--directory", type=Path, help="where disks are made; default: TMPDIR")
    parser.add_argument("--unsafe", action="store_true", help="without LMDB's syncs: must fail")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="power-loss-", dir=options.directory) as work:
        outages = Outages(
            options.seed,
            Path(work),
            lambda line: print(line, flush=True),
            without_syncs if options.unsafe else lambda: None,
        )
        try:
            outages.run(commands=options.commands, states=options.states, seconds=options.seconds)
        except PromiseBrokenError as failure:
            print(f"tools/power_loss: {failure}", file=sys.stderr)
            return 1
        except DiskError as error:
            print(f"tools/power_loss: {error}", file=sys.stderr)
            return 2
    print("\n".join(_lines(outages.figures)))
    if options.json:
        options.json.write_text(json.dumps(outages.figures.document(), indent=2) + "\n")
    return 0


def _lines(figures: Figures) -> list[str]:
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(figures.states.items()))
    commands = ", ".join(f"{kind} {count}" for kind, count in sorted(figures.commands.items()))
    return [
        f"{figures.states_in_all} states of {figures.recordings} recordings, "
        f"{figures.seconds:.0f} s; nothing that was reported was lost",
        f"recorded: {commands}; {figures.operations} operations of the disk, "
        f"{figures.flushes} of them flushes",
        f"writes since the last flush: {kinds}",
        f"unfinished commands met: {figures.unfinished}, of which in effect: {figures.whole}",
        f"compared with sources: {figures.bytes >> 20} MiB",
    ]


if __name__ == "__main__":
    sys.exit(main())
