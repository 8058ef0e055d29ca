"""A gc that is killed leaves a sound store, and the next one finishes its work."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.fault.interrupted import allocated, stop_after, stop_when
from tests.interop.corpus import Images
from tests.interop.rig import StoreDirectory

ROUNDS = 6


@pytest.mark.parametrize("number", range(ROUNDS))
def test_gc_killed_anywhere_loses_nothing_and_the_next_one_finishes(
    store_dir: StoreDirectory, images: Images, tmp_path: Path, number: int
) -> None:
    # noise goes frame by frame; base's frames that derived shares are rewritten.
    store_dir.import_file(images.noise, "noise")
    store_dir.remove("noise", "base", "clone")
    commits = random.Random(number).randrange(1, 20) if number else 0
    stop_after(store_dir.path, commits, signal.SIGKILL, "gc")

    store_dir.check()
    for name in ("derived", "ragged"):
        assert store_dir.export(name) == getattr(images, name).read_bytes()

    store_dir.gc()
    chunks, _, unique, _ = store_dir.totals()
    left = StoreDirectory(tmp_path / "never-crashed")
    left.create()
    left.import_file(images.derived, "derived")
    left.import_file(images.ragged, "ragged")
    assert (chunks, unique) == (left.totals()[0], left.totals()[2])


def test_gc_interrupted_by_ctrl_c_says_so_in_one_line_or_has_finished(
    store_dir: StoreDirectory, images: Images
) -> None:
    store_dir.import_file(images.noise, "noise")
    store_dir.remove("noise")
    printed = stop_after(store_dir.path, 3, signal.SIGINT, "gc")
    assert printed in {
        "",
        "dedupstore: interrupted; nothing was finished (run 'dedupstore gc')\n",
    }


def test_image_removed_and_imported_again_around_a_killed_gc_is_whole(
    store_dir: StoreDirectory, images: Images
) -> None:
    store_dir.import_file(images.noise, "noise")
    store_dir.remove("noise")
    stop_after(store_dir.path, 7, signal.SIGKILL, "gc")
    store_dir.import_file(images.noise, "noise")
    store_dir.gc()
    assert store_dir.export("noise") == images.noise.read_bytes()


@pytest.mark.parametrize("number", range(4))
def test_compaction_killed_anywhere_loses_nothing_and_the_next_one_finishes(
    store_dir: StoreDirectory, images: Images, number: int
) -> None:
    store_dir.import_file(images.noise, "noise")
    store_dir.remove("noise")
    store_dir.gc()
    before = allocated(store_dir.path)
    stop_when(
        store_dir.path,
        lambda: allocated(store_dir.path) < before - number * (4 << 20),
        signal.SIGKILL,
        "gc",
        "--compact",
    )
    store_dir.check()
    for name in ("base", "derived", "ragged"):
        assert store_dir.export(name) == getattr(images, name).read_bytes()
    store_dir.do("gc", "--compact")
    assert allocated(store_dir.path) < before - (15 << 20)
    store_dir.import_file(images.noise, "noise")
    assert store_dir.export("noise") == images.noise.read_bytes()
