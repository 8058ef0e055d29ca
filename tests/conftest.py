"""Fixtures and builders shared by all tests.

`store` is an open, empty store that is scrubbed when the test ends: whatever a test did, `check`
must find nothing, unless the test is marked `damaged`. Images are made by `pattern` and friends
from numbers, so that a failing test can be repeated byte for byte.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest
from hypothesis import HealthCheck, settings

from dedupstore.cache import FrameCache
from dedupstore.check import check_store
from dedupstore.env import REMOTE_DATABASES
from dedupstore.imported import Imported
from dedupstore.reader import ImageReader, Prefetcher, ReadCounters
from dedupstore.store import Store

GRID = 4096
CACHE_BYTES = 4 << 20

settings.register_profile(
    "local", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "damaged: the test leaves damage in its store on purpose")


# --- content ---


def noise(seed: int, length: int = GRID) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(length)


def text(seed: int, length: int = GRID) -> bytes:
    """Bytes that compress well, the same for the same seed."""
    line = b"%d: the quick brown fox jumps over the lazy dog\n" % seed
    return (line * (length // len(line) + 1))[:length]


def blocks(*seeds: int) -> bytes:
    """An image of 4 KiB blocks: equal numbers are equal blocks, 0 is a block of zeros."""
    return b"".join(noise(seed) if seed else bytes(GRID) for seed in seeds)


def write_sparse(path: Path, data: bytes) -> Path:
    """Write `data`, its zero blocks as holes."""
    with path.open("wb") as file:
        for at in range(0, len(data), GRID):
            block = data[at : at + GRID]
            if any(block):
                file.seek(at)
                file.write(block)
        file.truncate(len(data))
    return path


# --- stores ---


def silent(_done: int, _total: int) -> None:
    """A progress callback that does nothing."""


def import_bytes(store: Store, directory: Path, name: str, data: bytes) -> Imported:
    """Import `data` as a raw image."""
    source = directory / "import.source"
    source.write_bytes(data)
    try:
        return store.import_path(source, name, silent)[1]
    finally:
        source.unlink()


class SilentPrefetcher:
    """Stands for the readahead threads: notes what was asked for and loads nothing."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def request(self, frame: int) -> bool:
        self.asked.append(frame)
        return True

    def loaded(self) -> None:
        pass


@contextmanager
def opened(
    store: Store, name: str, budget: int = CACHE_BYTES, *, readahead: bool = False
) -> Iterator[ImageReader]:
    """A reader of an image through a cache of its own; with the real readahead on request."""
    counters = ReadCounters()
    loader = store.loader()
    cache = FrameCache(budget, loader.load)
    prefetcher = (
        Prefetcher(cache, counters, is_worth=loader.is_worth_loading_ahead)
        if readahead
        else SilentPrefetcher()
    )
    manifest = store.open_manifest(name)
    try:
        yield ImageReader(name, manifest, cache, prefetcher, counters)  # type: ignore[arg-type]
    finally:
        store.close_manifest(manifest)
        if isinstance(prefetcher, Prefetcher):
            prefetcher.close()


def read_range(reader: ImageReader, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xaa" * length)
    if length:
        reader.read(memoryview(buffer), offset)
    return bytes(buffer)


def read_image(store: Store, name: str) -> bytes:
    """All of an image, through reader and cache."""
    with opened(store, name) as reader:
        size = reader.manifest.size
        return b"".join(
            read_range(reader, at, min(1 << 20, size - at)) for at in range(0, size, 1 << 20)
        )


def flipped(record: bytes, bit: int) -> bytes:
    """`record` with one bit changed."""
    changed = bytearray(record)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def handle_of(store: Store, database: str) -> lmdb._Database:
    """One of the store's databases by its name; those of remotes are made if they are not there."""
    owner = store.env.open_remote() if database in REMOTE_DATABASES else store.env
    return getattr(owner, database)


def flip_record(store: Store, database: str, key: bytes, bit: int) -> None:
    """Change one bit of a stored value, as a bad disk would. Negative bits count from the end."""
    handle = handle_of(store, database)
    with store.env.write() as txn:
        record = bytes(txn.get(key, db=handle))
        txn.put(key, flipped(record, bit % (len(record) * 8)), db=handle)


def keys_of(store: Store, database: str) -> list[bytes]:
    """The keys of one of the store's databases."""
    handle = handle_of(store, database)
    with store.env.read() as txn:
        cursor = txn.cursor(db=handle)
        return [bytes(key) for key in cursor.iternext(values=False)]


def hammered(work: Callable[[], None]) -> None:
    """Run with threads that change as often as the interpreter allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        work()
    finally:
        sys.setswitchinterval(interval)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in `count` threads that start together; the first failure is raised here."""
    barrier = threading.Barrier(count)
    failures: list[BaseException] = []

    def run(i: int) -> None:
        try:
            barrier.wait(60)
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(store_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    """An open, empty store, scrubbed after the test."""
    opened_store = Store.create(store_path)
    yield opened_store
    opened_store.close()
    if request.node.get_closest_marker("damaged") is None:
        assert check_store(store_path).findings == ()


@pytest.fixture
def add(store: Store, tmp_path: Path) -> Callable[[str, bytes], Imported]:
    """`add(name, data)` imports bytes as a raw image into `store`."""
    return lambda name, data: import_bytes(store, tmp_path, name, data)
