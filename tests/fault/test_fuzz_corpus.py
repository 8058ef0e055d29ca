"""Whoever reads input that others made keeps its promises: see tools/fuzzing.

Replays every input that is kept, among them all that ever broke a promise, and fuzzes each target
for a moment more. `tools/fuzz` goes on for as long as one likes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.fuzzing.targets import CORPUS, NAMES, ROOT, load

CORPUS_BYTES_MAX = 1_000_000
INPUTS = sorted(path for path in CORPUS.glob("*/*"))
SECONDS = 2  # for each target


@pytest.mark.parametrize("name", NAMES)
def test_every_kept_input_keeps_the_promise(name: str) -> None:
    target = load(name)
    inputs = [path for path in INPUTS if path.parent.name == name]
    assert inputs, "a target without seeds"
    for path in inputs:
        target.run(path.read_bytes())


def test_kept_inputs_are_few_and_each_has_its_target() -> None:
    assert {path.parent.name for path in INPUTS} == set(NAMES)
    assert sum(path.stat().st_size for path in INPUTS) < CORPUS_BYTES_MAX


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_what_the_target_makes(name: str) -> None:
    """Those of the compressed ones differ with the library that compressed them."""
    seeds = load(name).seeds()
    kept = {p.name.removeprefix("seed-") for p in INPUTS if p.match(f"{name}/seed-*")}
    assert kept == set(seeds)


def test_a_moment_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tools.fuzzing", "--all", "--seconds", str(SECONDS)),
            *("--json", report, "--work", tmp_path / "work"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(path.read_text()[-3000:] for path in (tmp_path / "work").glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs}"
    for result in json.loads(report.read_text())["targets"]:
        assert result["executions"] > 10, result
        assert result["coverage"] > 0, result


def test_a_broken_promise_is_found_and_reported(tmp_path: Path) -> None:
    """The rig itself: a target that breaks its promise for one of its seeds."""
    broken = """
import sys
from tools.fuzzing import engine, targets
from tools.fuzzing import handshake
def run(data):
    assert b"NBDMAGIC" not in data
handshake.run = run
targets.load = lambda name: handshake
sys.argv[1:] = ["handshake", "-max_total_time=5", f"-artifact_prefix={sys.argv[1]}/", sys.argv[2]]
engine.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", broken, tmp_path, CORPUS / "handshake"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, done.stderr
    (kept,) = tmp_path.glob("crash-*")
    assert b"NBDMAGIC" in kept.read_bytes()
