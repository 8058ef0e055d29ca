"""A process is killed while it stores a manifest and fetches the first of the image beside that:
the next one finds a sound store, and every byte is what it should be."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dedupstore.check import check_store
from dedupstore.remote.configuration import add_remote
from dedupstore.store import Store
from dedupstore.traces import make_trace
from tests.conftest import import_bytes, noise, read_image, silent
from tests.remotes import push
from tests.unit.test_laid_out import chunk_at

IMAGE = noise(41, 12 << 20)
PULL = """
import sys
from pathlib import Path
from dedupstore.store import Store
store = Store(Path(sys.argv[1]), grows=True)
print("ready", flush=True)
store.pull("far", "a", "a", lambda _done, _all: None, lazy=True, begin=True)
print("pulled", flush=True)
store.close()
print("closed", flush=True)
"""


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("origin")
    with Store.create(directory / "origin") as origin:
        add_remote(origin.env, "far", [str(directory / "far")])
        import_bytes(origin, directory, "a", IMAGE)
        offsets = random.Random(6).sample(range(0, len(IMAGE), 1 << 17), 40)
        trace = make_trace(bytes(32), [chunk_at(origin, "a", offset) for offset in offsets])
        push(origin, "far", "a", trace=trace)
    return directory / "far"


def seconds_of(path: Path) -> float:
    """How long the process takes from when it is ready."""
    process = start(path)
    begin = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 0
    return time.monotonic() - begin


def start(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PULL, path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_at_any_time_it_leaves_a_store_that_goes_on(far: Path, tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        with Store.create(tmp_path / name) as store:
            add_remote(store.env, "far", [str(far)])
        return tmp_path / name

    usual = seconds_of(fresh("usual"))
    reached: set[str] = set()
    for number in range(24):
        path = fresh(f"store{number}")
        process = start(path)
        time.sleep(usual * number / 20)
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        reached.add(said)
        with Store(path) as store:
            named = store.names() == ["a"]
            assert named or "pulled" not in said
            store.pull("far", "a", "a", silent, lazy=True, begin=True)
            assert read_image(store, "a") == IMAGE
        assert check_store(path).findings == ()
    assert len(reached) >= 2
