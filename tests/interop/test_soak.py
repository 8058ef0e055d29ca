"""A short soak: everything at once to one store. tools/soak runs it for as long as one likes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.interop.rig import CHECKOUT, require_nbdkit

KINDS = {"check", "clone", "export", "gc", "gc --compact", "import", "rename", "rm"}


def test_maintenance_under_sixteen_clients_costs_neither_bytes_nor_errors(tmp_path: Path) -> None:
    require_nbdkit()
    figures_file = tmp_path / "figures.json"
    options = ("--quiet", "1", "--seconds", "8", "--clients", "16", "--servers", "2")
    result = subprocess.run(
        [sys.executable, "-m", "tools.soaking", *options, "--json", figures_file],
        cwd=CHECKOUT,
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stderr) == (0, "")
    figures = json.loads(figures_file.read_text())
    assert figures["bytes_verified"] > figures["file_length_before"]
    assert figures["bytes_wrong"] == 0
    assert figures["errors"] == []
    assert figures["read_transactions_left"] == 0
    assert figures["operations"].keys() == KINDS
