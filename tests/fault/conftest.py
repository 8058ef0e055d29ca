"""Fixtures that the tests of this folder share; see tests/interop/fixtures.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interop.fixtures import empty_store_dir, filled_store, images, server, store_dir
from tests.interop.rig import CHECKOUT

__all__ = ["empty_store_dir", "filled_store", "images", "server", "store_dir"]

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    """`command(store, *arguments)` runs dedupstore; returns exit status, stdout and stderr."""
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("commands.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    ) as process:

        def run(store: Path, *arguments: str | Path) -> tuple[int, str, str]:
            assert process.stdin is not None
            assert process.stdout is not None
            line = json.dumps(["--store", str(store), *map(str, arguments)])
            process.stdin.write(line + "\n")
            process.stdin.flush()
            status, out, err = json.loads(process.stdout.readline())
            return status, out, err

        yield run
        process.communicate()
