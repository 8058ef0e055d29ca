"""Page cache of containers on this machine itself: file-backed EROFS mounts, with what its kernel
offers for sharing. tests/vm has other kernels, whose page cache nobody else uses.

/proc/meminfo counts the whole machine, so figures are the least of several rounds.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dedupstore.mounts import sharing
from tests.interop.rig import StoreDirectory, require_nbdkit
from tests.programs import require_root, unavailable
from tests.vm.rig import debian_roots, new_bytes
from tools.guests import inside

MB = 10**6
ROUNDS = 3
# Directories and metadata of a container: see tests/vm/test_sharing.py.
OVERHEAD_BYTES = int(4.5 * MB)
# What the machine itself does meanwhile.
NOISE_BYTES = MB


@pytest.fixture(scope="module")
def store() -> Iterator[StoreDirectory]:
    """base, derived and clone, as in tests/vm."""
    require_root()
    require_nbdkit()
    roots = debian_roots()
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/var/tmp") as directory:
        store = StoreDirectory(Path(directory) / "store")
        store.create()
        for name in ("base", "derived"):
            store.do("import", roots / name, name)
        store.do("clone", "base", "clone")
        yield store
        store.check()


@pytest.fixture(scope="module")
def costs(
    store: StoreDirectory, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], list[int]]]:
    """Page cache in bytes that mounting and reading base, derived and clone takes, by mode."""
    patch = pytest.MonkeyPatch()
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/tmp") as directory:
        patch.setenv("DEDUPSTORE_RUN", f"{directory}/run")
        known: dict[str, list[int]] = {}

        def measure(mode: str) -> list[int]:
            if mode not in known:
                rounds = [_round(store, Path(directory), mode) for _ in range(ROUNDS)]
                known[mode] = [min(each) for each in zip(*rounds, strict=True)]
            return known[mode]

        yield measure
    patch.undo()


def _round(store: StoreDirectory, directory: Path, mode: str) -> list[int]:
    """The first container is read twice: only then is what the server reads from, which is in this
    machine's page cache as well, not counted."""
    points = {name: directory / name for name in ("base", "derived", "clone")}
    grown = []
    inside.drop_caches()
    try:
        for name, point in points.items():
            point.mkdir(exist_ok=True)
            before = inside.cached_bytes()
            store.do("mount", f"--share={mode}", name, point)
            inside.read_all(str(point))
            grown.append(inside.cached_bytes() - before)
        for name in ("derived", "clone"):
            store.do("umount", points[name])
        inside.drop_caches()
        before = inside.cached_bytes()
        inside.read_all(str(points["base"]))
        grown[0] = inside.cached_bytes() - before
    finally:
        for point in points.values():
            if os.path.ismount(point):
                store.do("umount", point)
    return grown


def test_second_container_costs_what_is_new(costs: Callable[[str], list[int]]) -> None:
    best = sharing.candidates("auto")[0]
    if best == "none":
        unavailable("this kernel shares nothing between different images")
    first, second, clone = costs(best)
    assert 100 * MB < first < 160 * MB
    assert second <= new_bytes() + OVERHEAD_BYTES + NOISE_BYTES
    assert clone <= 0.1 * MB + NOISE_BYTES


def test_without_sharing_only_the_identical_clone_is_free(
    costs: Callable[[str], list[int]],
) -> None:
    first, second, clone = costs("none")
    assert min(first, second) > 100 * MB
    assert clone <= 0.1 * MB + NOISE_BYTES
