"""Kills dedupstore's commands and servers at random instants, thousands of times, and holds the
store against a model after each: tools/crash_loop [--rounds N] [--seconds S] [--seed N] [--json
FILE].

Killed with SIGKILL, after a time or at a system call (`crashes.instants`): import of files,
directories, archives and streams, clone, rename, rm, gc (and gc --compact where there is one),
check, check --repair on a store that was damaged, export, pull (and pull --lazy) from a remote in a
directory, evict, and nbdkit while clients read, of lazy images, too; alone or
two to four at once on one store. After each round the store opens, check finds nothing, every name
that a command had reported is there and its image is byte for byte its source, every name whose
removal was reported is gone, and what an unfinished command would have done is there whole or not
at all. After 40 rounds gc brings the store to what an uncrashed twin holds (`crashes.twins` has the
bounds), and with every name removed to nothing.

The result means nothing
- about power loss: a killed process loses nothing that it had written, synced or not
  (tools/power_loss is about that);
- if kills come too late or too early: a run reports how many commands were killed of how many, and
  `whole`, those killed between taking effect and reporting it, which should not be 0;
- on a store that another user's commands write to, or if `check` itself is blind: that it finds
  damage is what tests/fault and tests/unit/test_check.py are for. Bytes are compared without it;
- about the machine's other file systems: LMDB is sure only on local ones.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.crashes.rounds import Figures, Loop, PromiseBrokenError


def main() -> int:
    """Run the loop; returns the exit status: 1 if the store broke a promise."""
    parser = argparse.ArgumentParser(prog="tools/crash_loop", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=1_000_000, help="stop after this many")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after this time")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--epoch", type=int, default=0, help="begin with this store of the seed's")
    parser.add_argument("--directory", type=Path, help="where stores are made; default: TMPDIR")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="crash-loop-", dir=options.directory) as work:
        loop = Loop(options.seed, Path(work), lambda line: print(line, flush=True))
        try:
            loop.run(epoch=options.epoch, rounds=options.rounds, seconds=options.seconds)
        except PromiseBrokenError as failure:
            print(f"tools/crash_loop: {failure}", file=sys.stderr)
            return 1
    print("\n".join(_lines(loop.figures)))
    if options.json:
        options.json.write_text(json.dumps(loop.figures.document(), indent=2) + "\n")
    return 0


def _lines(figures: Figures) -> list[str]:
    kinds = ", ".join(
        f"{kind} {figures.kills[kind]}/{ran}" for kind, ran in sorted(figures.commands.items())
    )
    return [
        f"{figures.kills_in_all} kills in {figures.rounds} rounds, {figures.seconds:.0f} s; "
        "nothing that was reported was lost",
        f"killed/run: {kinds}",
        f"at a system call: {figures.kills_at_calls}; of the real program: "
        f"{figures.kills_spawned}; beside other commands: {figures.kills_in_company}",
        f"took effect without having reported it: {figures.whole}",
        f"compared with sources: {figures.bytes >> 20} MiB, by clients before their server was "
        f"killed: {figures.served >> 20} MiB",
        f"after gc, over an uncrashed twin: at most {figures.pages_over_twin_max} pages, "
        f"{figures.frames_over_twin_max} frames; emptied: {figures.pages_of_emptied_max} pages",
    ]


if __name__ == "__main__":
    sys.exit(main())
