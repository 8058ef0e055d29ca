"""An import that is killed or interrupted leaves a sound store and nothing beyond gc's reach."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.fault.interrupted import start, stop_after, transactions
from tests.interop.corpus import Images
from tests.interop.rig import Servers, StoreDirectory, wait_until

ROUNDS = 10
COMMITS_OF_WHOLE_IMPORT = 33  # noise is 16 MiB; interrupted.py commits every half MiB


@pytest.mark.parametrize("number", range(ROUNDS))
def test_import_killed_anywhere_leaves_nothing_that_gc_cannot_reclaim(
    store_dir: StoreDirectory, images: Images, number: int
) -> None:
    before = store_dir.totals()
    commits = random.Random(number).randrange(COMMITS_OF_WHOLE_IMPORT) if number else 0
    stop_after(store_dir.path, commits, signal.SIGKILL, "import", images.noise, "noise")

    store_dir.check()
    if "noise" in store_dir.names():  # the kill came too late: an image is there whole or not
        assert store_dir.export("noise") == images.noise.read_bytes()
        store_dir.remove("noise")
    assert store_dir.export("base") == images.base.read_bytes()
    store_dir.gc()
    assert store_dir.totals() == before
    assert list((store_dir.path / "tmp").iterdir()) == []

    # gc may have left frame numbers unused, but the images are those of a store never crashed.
    store_dir.import_file(images.noise, "noise")
    assert store_dir.export("noise") == images.noise.read_bytes()


def test_store_after_crash_gc_and_import_holds_what_an_uncrashed_one_holds(
    store_dir: StoreDirectory, empty_store_dir: StoreDirectory, images: Images
) -> None:
    for name in ("base", "derived", "ragged", "noise"):
        empty_store_dir.import_file(getattr(images, name), name)
    stop_after(store_dir.path, 9, signal.SIGKILL, "import", images.noise, "noise")
    store_dir.gc()
    store_dir.import_file(images.noise, "noise")
    assert store_dir.totals() == empty_store_dir.totals()


def test_import_after_a_crash_uses_again_what_the_crashed_one_stored(
    store_dir: StoreDirectory, images: Images
) -> None:
    stop_after(store_dir.path, 9, signal.SIGKILL, "import", images.noise, "noise")
    stored = store_dir.totals()
    store_dir.import_file(images.noise, "noise")
    assert store_dir.totals()[2] - stored[2] < images.noise.stat().st_size // 4 * 3
    store_dir.gc()
    assert store_dir.totals()[2] >= images.noise.stat().st_size


def test_killed_import_of_a_running_server_s_store_harms_no_reader(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    running = server()
    stop_after(store_dir.path, 5, signal.SIGKILL, "import", images.noise, "noise")
    store_dir.gc()
    assert running.read("derived") == images.derived.read_bytes()


@pytest.mark.parametrize("commits", [0, 12])
def test_ctrl_c_ends_an_import_with_one_line_and_status_1(
    store_dir: StoreDirectory, images: Images, commits: int
) -> None:
    before, begin = store_dir.totals(), transactions(store_dir.path)
    with start(store_dir.path, "import", images.noise, "noise") as process:
        # Not before the command runs: until then Python's own start-up answers Ctrl-C.
        wait_until(lambda: _has_open(process.pid, images.noise))
        wait_until(lambda: transactions(store_dir.path) >= begin + commits)
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate()
    assert printed == "dedupstore: interrupted; nothing was finished (run 'dedupstore gc')\n"
    assert process.returncode == 1
    store_dir.gc()
    assert store_dir.totals() == before


def test_interrupt_sent_to_the_program_alone_ends_the_import(
    store_dir: StoreDirectory, images: Images
) -> None:
    before = store_dir.totals()
    with start(store_dir.path, "import", images.noise, "noise") as process:
        wait_until(lambda: _has_open(process.pid, images.noise))
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate()
    assert printed == "dedupstore: interrupted; nothing was finished (run 'dedupstore gc')\n"
    assert process.returncode == 1
    store_dir.gc()
    assert store_dir.totals() == before


def _has_open(parent: int, path: Path) -> bool:
    """Whether a child of `parent` has a file open."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        for link in Path(f"/proc/{child}/fd").glob("*"):
            try:
                if link.readlink() == path:
                    return True
            except OSError:
                continue
    return False


def test_sigterm_ends_an_import_and_its_workers(store_dir: StoreDirectory, images: Images) -> None:
    before = store_dir.totals()
    stop_after(store_dir.path, 3, signal.SIGTERM, "import", images.noise, "noise")
    store_dir.gc()
    assert store_dir.totals() == before
