"""What the store's file leaves in the kernel's page cache."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupstore.reader import Prefetcher
from dedupstore.store import Store
from nbdplugin.session import Config, Session
from tests.conftest import import_bytes, noise, read_image, read_range

PATIENCE_SECONDS = 60  # only a hang takes that long
DATA = noise(1, 8 << 20)


@pytest.fixture
def directory() -> Iterator[Path]:
    """On a disk: what lies in memory only cannot be forgotten."""
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/var/tmp") as path:
        yield Path(path)


@pytest.fixture
def path(directory: Path) -> Path:
    path = directory / "store"
    with Store.create(path) as store:
        import_bytes(store, directory, "image", DATA)
    return path


def cached_bytes(path: Path) -> int:
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path / "data.mdb")]
    return int(subprocess.check_output(command))


def test_pages_that_were_read_can_be_forgotten_and_read_again(path: Path) -> None:
    with Store(path) as store:
        assert read_image(store, "image") == DATA
        assert cached_bytes(path) >= len(DATA)
        store.env.forget_cached_pages()
        assert cached_bytes(path) < len(DATA) // 4
        assert read_image(store, "image") == DATA


@pytest.mark.parametrize(("budget", "forgotten"), [(64 << 20, True), (2 << 20, False)])
def test_idle_server_forgets_pages_while_its_cache_has_room(
    path: Path, budget: int, forgotten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prefetcher, "_IDLE_SECONDS", 0.05)
    asked = []
    tidy = Session._forget_cached_pages
    monkeypatch.setattr(Session, "_forget_cached_pages", lambda s: (tidy(s), asked.append(1)))
    config = Config(path)
    config.cache_bytes = budget
    session = Session(config)
    reader = session.open("image")
    try:
        for at in range(0, len(DATA), 1 << 20):
            assert read_range(reader, at, 1 << 20) == DATA[at : at + (1 << 20)]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked
        assert (cached_bytes(path) < len(DATA) // 4) is forgotten
        assert read_range(reader, 0, 1 << 20) == DATA[: 1 << 20]
    finally:
        session.close_export(reader)
        session.close()
