"""The command line: runs targets side by side, prints a table, and writes it as JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.fuzzing.engine import RSS_MB_MAX, SECONDS_MAX
from tools.fuzzing.targets import CORPUS, NAMES, ROOT, write_seeds

_WORK = ROOT / "build" / "fuzz"
_STATUS = re.compile(r"^#\d+\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)
_EXECUTIONS = re.compile(r"^stat::number_of_executed_units:\s+(\d+)", re.MULTILINE)
_PEAK = re.compile(r"^stat::peak_rss_mb:\s+(\d+)", re.MULTILINE)
_SLOWEST = re.compile(r"^stat::slowest_unit_time_sec:\s+(\d+)", re.MULTILINE)
_KEPT_BYTES_MAX = 40_000  # of a target's inputs that --keep chooses


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one target. `coverage` counts libFuzzer's edges, `features` those with how often
    they are passed; `corpus` the inputs that found one; `broken` names inputs that broke the
    promise."""

    target: str
    seconds: float
    executions: int
    coverage: int
    features: int
    corpus: int
    peak_rss_mb: int
    slowest_input_seconds: int
    broken: list[str]
    status: int


def fuzz(name: str, seconds: int, work: Path) -> Result:
    """Run one target for some seconds and leave what it found in `work`."""
    found, broken = work / name, work / f"{name}.broken"
    for folder in (found, broken, CORPUS / name):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(broken.iterdir())
    began = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "tools.fuzzing.engine", name),
            f"-max_total_time={seconds}",
            f"-artifact_prefix={broken}/",
            "-print_final_stats=1",
            *(str(found), str(CORPUS / name)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    took = time.monotonic() - began
    status = _STATUS.findall(done.stderr) or [("0", "0", "0")]
    coverage, features, corpus = (int(number) for number in status[-1])
    new = sorted(str(path) for path in set(broken.iterdir()) - before)
    if done.returncode:
        (work / f"{name}.log").write_text(done.stdout + done.stderr)
    return Result(
        name,
        round(took, 1),
        _last(_EXECUTIONS, done.stderr),
        coverage,
        features,
        corpus,
        _last(_PEAK, done.stderr),
        _last(_SLOWEST, done.stderr),
        new,
        done.returncode,
    )


def _last(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.findall(text)
    return int(found[-1]) if found else 0


def keep(name: str) -> None:
    """Add to tests/corpus what of build/fuzz finds most for its bytes: libFuzzer merges it to the
    fewest inputs with all features; of these the shortest, up to a bound, replace those kept."""
    folder = CORPUS / name
    for old in folder.glob("found-*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as merged:
        for path in folder.iterdir():
            (Path(merged) / path.name).write_bytes(path.read_bytes())
        subprocess.run(
            [
                *(sys.executable, "-m", "tools.fuzzing.engine", name),
                *("-merge=1", merged, str(_WORK / name)),
            ],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        new = [p for p in Path(merged).iterdir() if not (folder / p.name).exists()]
        left = _KEPT_BYTES_MAX
        for path in sorted(new, key=lambda p: (p.stat().st_size, p.name)):
            left -= path.stat().st_size
            if left >= 0:
                (folder / f"found-{path.name[:12]}").write_bytes(path.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/fuzz", description="Fuzz what reads hostile input."
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--work", type=Path, default=_WORK, help="found inputs (build/fuzz)")
    parser.add_argument("--list", action="store_true", help="print the targets")
    parser.add_argument("--seeds", action="store_true", help="write tests/corpus/*/seed-* anew")
    parser.add_argument("--keep", action="store_true", help="write tests/corpus/*/found-* anew")
    options = parser.parse_args()
    names = NAMES if options.all else tuple(options.targets)
    if unknown := set(names) - set(NAMES):
        parser.error(f"no target {', '.join(sorted(unknown))} (see --list)")
    if options.list:
        print("\n".join(NAMES))
        return 0
    if options.seeds or options.keep:
        for name in names or NAMES:
            (write_seeds if options.seeds else keep)(name)
        return 0
    if not names:
        parser.error("name targets, or say --all")
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda name: fuzz(name, options.seconds, options.work), names))
    _print_table(results)
    if options.json:
        document = {
            "seconds_max": SECONDS_MAX,
            "rss_mb_max": RSS_MB_MAX,
            "executions": sum(result.executions for result in results),
            "targets": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return int(any(result.broken or result.status for result in results))


def _print_table(results: list[Result]) -> None:
    print("| target | seconds | executions | coverage | inputs | peak MB | broken |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for r in results:
        row = (r.target, r.seconds, r.executions, r.coverage, r.corpus, r.peak_rss_mb)
        print(f"| {' | '.join(map(str, row))} | {len(r.broken)} |")
        for path in r.broken:
            print(f"broken: {path}", file=sys.stderr)
        if r.status and not r.broken:
            print(
                f"{r.target}: libFuzzer ended with {r.status}, see {r.target}.log", file=sys.stderr
            )


if __name__ == "__main__":
    sys.exit(main())
