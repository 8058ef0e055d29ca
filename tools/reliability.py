"""Runs every attack on the store, one after the other, and puts the figures into
docs/reliability.md: tools/reliability [--seconds S] [ATTACK...].

Owns which attacks there are and which of their figures are told; each is a program of its own under
tools/, which fails if a promise is broken, and then nothing is written. Attacks that are not named
keep the figures that the page has.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
_SEED = 20261121

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Attack:
    """A program under tools/. `options` of it get the seconds that it may take put in for {};
    `tell` makes lines for people of what it has written with --json."""

    name: str
    options: str
    tell: Callable[[Figures], list[str]]

    def command(self, seconds: int) -> str:
        """The command line that gives its figures."""
        return f"tools/{self.name} {self.options.format(seconds)}"

    def run(self, seconds: int) -> str:
        """Run it; the part of the page that tells its figures. Raises CalledProcessError."""
        command = self.command(seconds)
        with tempfile.TemporaryDirectory() as directory:
            written = Path(directory) / "figures.json"
            words = [*shlex.split(command), "--json", str(written)]
            subprocess.run(words, cwd=ROOT, check=True)
            lines = self.tell(json.loads(written.read_text()))
        day = datetime.now(UTC).strftime("%Y-%m-%d")
        machine = f"{len(_processors())} processors, Linux {platform.release()}"
        return "\n".join([f"`{command}` ({day}, {machine})", "", *(f"- {x}" for x in lines)])


def _processors() -> list[str]:
    return re.findall(r"^processor", Path("/proc/cpuinfo").read_text(), re.MULTILINE)


def _counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count:,}" for name, count in ordered)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _tell_kills(figures: Figures) -> list[str]:
    return [
        f"{figures['kills_in_all']:,} commands and servers killed, in {figures['rounds']:,} "
        f"rounds: {_counts(figures['kills'])}",
        f"{figures['kills_at_calls']:,} of them at a counted system call, the others at a random "
        f"instant; {figures['kills_in_company']:,} with other processes on the store",
        f"{_megabytes(figures['bytes'])} of images compared with their sources, "
        f"{_megabytes(figures['served'])} read by clients; nothing wrong",
        f"after gc at most {figures['pages_over_twin_max']} pages and "
        f"{figures['frames_over_twin_max']} frames more than a twin that was never killed",
    ]


def _tell_outages(figures: Figures) -> list[str]:
    return [
        f"{figures['states_in_all']:,} states of the disk after power loss, of "
        f"{figures['operations']:,} recorded operations ({figures['flushes']:,} flushes): every "
        "store intact, nothing lost that was reported",
        f"what was left of the writes since the last flush: {_counts(figures['states'])}",
        f"{figures['unfinished']:,} unfinished commands met, each whole or not there; "
        f"{_megabytes(figures['bytes'])} compared",
    ]


def _tell_faults(figures: Figures) -> list[str]:
    return [
        f"{figures['faults_in_all']:,} of {figures['points']:,} points: "
        f"{_counts(figures['faults'])}",
        f"in {_counts(figures['commands'])}",
        f"{figures['failed']:,} commands failed with one line and changed nothing, "
        f"{sum(figures['endured'].values()):,} did without what failed; {figures['retried']:,} "
        f"succeeded without the fault; {_megabytes(figures['bytes'])} compared",
    ]


def _tell_restarts(figures: Figures) -> list[str]:
    lines = [f"{figures['killed']} times kill -9, {figures['stopped']} times SIGTERM"]
    lines += [
        f"{name}: {client['reads']:,} reads, {_megabytes(client['bytes'])}, "
        f"{client['errors']} errors, {client['wrong']} wrong; at most "
        f"{client['longest_seconds']:.1f} s for one"
        for name, client in figures["clients"].items()
    ]
    return lines


def _tell_storms(figures: Figures) -> list[str]:
    return [
        f"{figures['reads']:,} reads, {_megabytes(figures['bytes'])} compared, in "
        f"{figures['rounds']} rounds of {figures['seconds']:.0f} s in all: nothing wrong",
        f"{figures['failed']:,} reads ended with EIO, the longest took "
        f"{figures['longest_seconds']:.1f} s; everything could be read after each storm",
        f"{figures['requests']:,} requests over the link; what went wrong there: "
        f"{_counts(figures['faults'])}",
        f"meanwhile {figures['kills']} times kill -9 of a server, {figures['evictions']} times "
        "`evict`",
    ]


def _tell_fuzzing(figures: Figures) -> list[str]:
    lines = [f"{figures['executions']:,} executions, nothing found that is not mended"]
    lines += [
        f"{target['target']}: {target['executions']:,} in {target['seconds']:.0f} s, "
        f"coverage {target['coverage']:,}, at most {target['peak_rss_mb']} MB"
        for target in figures["targets"]
    ]
    return lines


def _tell_soak(figures: Figures) -> list[str]:
    quiet, load = figures["quiet"], figures["load"]
    return [
        f"{_megabytes(figures['bytes_verified'])} verified by {figures['clients']} clients of "
        f"{figures['servers']} servers: {figures['bytes_wrong']} wrong bytes, "
        f"{len(figures['errors'])} errors",
        f"meanwhile {_counts(figures['operations'])}",
        f"p99 {quiet['p99_ms']:.1f} ms with clients alone, {load['p99_ms']:.1f} ms with all of "
        f"that ({figures['p99_ratio']:.2f} times)",
        f"`data.mdb` took {_megabytes(figures['file_bytes_before'])} before, was at most "
        f"{_megabytes(figures['file_length_max'])} long, took "
        f"{_megabytes(figures['file_bytes_after'])} after; "
        f"{figures['read_transactions_left']} read transactions left",
    ]


ATTACKS = (
    Attack("crash_loop", f"--seconds {{}} --seed {_SEED}", _tell_kills),
    Attack("power_loss", f"--seconds {{}} --seed {_SEED}", _tell_outages),
    Attack("fault_loop", f"--seconds {{}} --seed {_SEED}", _tell_faults),
    Attack("soak", "--seconds {} --quiet 15", _tell_soak),
    Attack("restarts", f"--rounds 20 --seed {_SEED}", _tell_restarts),
    Attack("remote_faults", f"--seconds {{}} --seed {_SEED}", _tell_storms),
    Attack("fuzz", "--all --seconds {}", _tell_fuzzing),
)


def with_part(page: str, name: str, part: str) -> str:
    """The page with what stands between an attack's marks replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{PAGE}: no marks for {name}")
    return f"{before}{begin}\n{part}\n\n{end}{after}"


def main() -> int:
    """Run attacks; the exit status is 1 if one of them found something."""
    names = [attack.name for attack in ATTACKS]
    parser = argparse.ArgumentParser(prog="tools/reliability", description=__doc__)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=int, default=180, help="of each; a fuzz target's share")
    options = parser.parse_args()
    if unknown := set(options.attacks) - set(names):
        parser.error(f"no attack is called {', '.join(sorted(unknown))}")
    for attack in ATTACKS:
        if options.attacks and attack.name not in options.attacks:
            continue
        try:
            part = attack.run(options.seconds)
        except subprocess.CalledProcessError as error:
            print(f"tools/{attack.name} failed with status {error.returncode}", file=sys.stderr)
            return 1
        PAGE.write_text(with_part(PAGE.read_text(), attack.name, part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
