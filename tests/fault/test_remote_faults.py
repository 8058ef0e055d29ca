"""Reading images while their remote is slow, down and wrong: a short run of tools/remote_faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.programs import require_program

PROGRAM = Path(__file__).parents[2] / "tools" / "remote_faults.py"


def test_no_byte_is_wrong_whatever_the_remote_does(tmp_path: Path) -> None:
    require_program("nginx", "nbdkit")
    written = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, PROGRAM, "--seconds", "6", "--seed", "4"),
            *("--directory", tmp_path, "--json", written),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(written.read_text())
    assert figures["reads"] > 0
    assert figures["faults"]
    assert figures["evictions"] > 0
