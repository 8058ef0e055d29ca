"""A data file that has grown to the end of its map: said in one line, and there is a way on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dedupstore import env
from tests.interop.corpus import Images
from tests.interop.rig import Servers, StoreDirectory, refusal
from tools.crashes import program

SMALL = 1 << 20  # beyond what the filled store has


def run(store: Path, map_bytes: int, *words: str | Path) -> tuple[int, str]:
    """A command in a process whose map is that small; the real ones' is 4 TiB."""

    def shrink() -> None:
        env.MAP_BYTES = map_bytes

    printed = program.Printed.open()
    invocation = program.Invocation(("--store", str(store), *map(str, words)))
    child = program.fork(invocation, printed, shrink)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, printed.read()[1]


@pytest.fixture
def map_bytes(store_dir: StoreDirectory) -> int:
    size = (store_dir.path / "data.mdb").stat().st_size
    return (size + SMALL) // 4096 * 4096


def test_import_into_a_full_map_says_what_to_do_and_disturbs_no_server(
    store_dir: StoreDirectory, images: Images, server: Servers, map_bytes: int
) -> None:
    running = server()
    assert running.read("base") == images.base.read_bytes()
    line = refusal(*run(store_dir.path, map_bytes, "import", images.noise, "noise"))
    assert "has grown to its limit" in line
    assert "'dedupstore rm'" in line
    assert store_dir.names() == ["base", "clone", "derived", "ragged"]
    store_dir.check()
    assert running.read("derived") == images.derived.read_bytes()
    # What the line says.
    assert run(store_dir.path, map_bytes, "rm", "derived", "clone", "base") == (0, "")
    assert run(store_dir.path, map_bytes, "gc") == (0, "")
    assert run(store_dir.path, map_bytes, "import", images.base, "again") == (0, "")
    assert running.read("again") == images.base.read_bytes()


def test_map_that_small_changes_have_filled_to_the_last_page_can_be_emptied(
    store_dir: StoreDirectory, images: Images, server: Servers, map_bytes: int
) -> None:
    running = server()
    status, number = 0, 0
    full = map_bytes - SMALL + (64 << 10)
    while not status:
        number += 1
        name = f"{number:05}".ljust(255, "x")
        status, err = run(store_dir.path, full, "clone", "base", name)
    assert "has grown to its limit" in refusal(status, err)
    clones = [name for name in store_dir.names() if name.endswith("x")]
    assert len(clones) == number - 1
    assert run(store_dir.path, full, "rm", *clones) == (0, "")
    assert run(store_dir.path, full, "gc") == (0, "")
    assert run(store_dir.path, full, "clone", "base", "more") == (0, "")
    assert running.read("more") == images.base.read_bytes()
