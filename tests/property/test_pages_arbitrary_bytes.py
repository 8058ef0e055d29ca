"""The page verifier against arbitrary damage: it never fails, and LMDB survives what it passes.

The second property is the module's purpose: if neither function objects to a mutated file, LMDB in
another process can read all of it, and write to it, without dying by a signal.
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import lmdb
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from dedupstore.errors import StoreDamagedError
from dedupstore.pages import datafile, verify_header, verify_pages

PAGE: Final = 4096

VICTIM: Final = """
import sys
import lmdb

for line in sys.stdin:
    path = line.rstrip()
    try:
        with lmdb.open(path, subdir=False, max_dbs=8, map_size=1 << 24, sync=False) as env:
            with env.begin() as txn:
                names = [bytes(key) for key, _ in txn.cursor()]
            for name in names:
                database = env.open_db(name, create=False)
                with env.begin(db=database) as txn:
                    keys = [bytes(key) for key, value in txn.cursor() if bytes(value) is not None]
                    assert all(txn.get(key) is not None for key in keys)
                with env.begin(write=True, db=database) as txn:
                    for key in keys[::2]:
                        txn.delete(key)
                    txn.put(b"new", b"n" * 9000)
    except lmdb.Error:
        pass  # refused, not crashed
    print("alive", flush=True)
"""


def build(path: Path, seed: int) -> bytes:
    rng = random.Random(seed)
    env = lmdb.open(str(path), subdir=False, map_size=1 << 24, max_dbs=8, sync=False)
    databases = [env.open_db(b"index"), env.open_db(b"frames")]
    env.open_db(b"empty")
    for _ in range(5):
        with env.begin(write=True) as txn:
            for _ in range(40):
                key = b"%02d" % rng.randrange(90) + b"k" * rng.randrange(200)
                txn.put(key, b"v" * rng.randrange(100), db=databases[0])
            for _ in range(3):
                key = b"%02d" % rng.randrange(9)
                txn.put(key, b"v" * rng.choice([500, 5000, 9000]), db=databases[1])
            txn.delete(b"%02d" % rng.randrange(9), db=databases[1])
    env.close()
    Path(f"{path}-lock").unlink()
    return path.read_bytes()


def structure_of(data: bytes) -> list[int]:
    """Offsets of the bytes that matter most: page headers, node offsets, and meta pages."""
    found = [*range(152), *range(PAGE, PAGE + 152)]
    for page in range(2, len(data) // PAGE):
        lower = min(
            PAGE, max(16, int.from_bytes(data[page * PAGE + 12 : page * PAGE + 14], "little"))
        )
        found += range(page * PAGE, page * PAGE + lower)
    return found


@pytest.fixture(name="originals", scope="module")
def make_originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    directory = tmp_path_factory.mktemp("originals")
    return [build(directory / f"{seed}.mdb", seed) for seed in range(4)]


@pytest.fixture(autouse=True, scope="module")
def do_not_wait_for_short_files_to_grow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datafile, "_CREATION_WAITS", ())
        yield


@pytest.fixture(name="places", scope="module")
def make_places(originals: list[bytes]) -> list[list[int]]:
    return [structure_of(original) for original in originals]


@pytest.fixture(name="path", scope="module")
def make_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "data.mdb"


class Victim:
    """A process that opens the files it is told, restarted by nobody: its death is the failure."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", VICTIM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def survives(self, path: Path) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        alive = self.process.stdout.readline() == "alive\n"
        Path(f"{path}-lock").unlink(missing_ok=True)
        return alive


@pytest.fixture(name="victim", scope="module")
def make_victim() -> Iterator[Victim]:
    victim = Victim()
    yield victim
    victim.process.communicate()


def passes(path: Path) -> bool:
    """Whether neither function objects. Nothing but StoreDamagedError may be raised."""
    try:
        verify_header(path)
    except StoreDamagedError:
        return False
    return not verify_pages(path).findings


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=3 * PAGE), header=st.booleans(), which=st.integers(0, 3))
def test_arbitrary_bytes_raise_nothing_else(
    originals: list[bytes], path: Path, data: bytes, which: int, *, header: bool
) -> None:
    path.write_bytes(
        (originals[which][: 2 * PAGE] if header else b"") + data.ljust(2 * PAGE, b"\0")
    )
    passes(path)
    verify_pages(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    which=st.integers(0, 3),
    flips=st.lists(st.tuples(st.booleans(), st.integers(0, 10**6), st.integers(0, 7)), max_size=4),
    permille=st.one_of(st.just(1000), st.integers(0, 1000)),
)
def test_what_passes_does_not_crash_lmdb(
    originals: list[bytes],
    places: list[list[int]],
    path: Path,
    victim: Victim,
    which: int,
    flips: list[tuple[bool, int, int]],
    permille: int,
) -> None:
    mutated = bytearray(originals[which])
    for in_structure, number, bit in flips:
        choice = places[which] if in_structure else range(len(mutated))
        mutated[choice[number % len(choice)]] ^= 1 << bit
    path.write_bytes(mutated[: len(mutated) * permille // 1000])
    verify_pages(path)
    if passes(path):
        assert victim.survives(path), victim.process.wait()


@pytest.mark.parametrize("seed", range(4))
def test_many_mutations_that_pass_do_not_crash_lmdb(
    originals: list[bytes], places: list[list[int]], path: Path, victim: Victim, seed: int
) -> None:
    rng = random.Random(seed)
    original = originals[seed]
    passed = 0
    for _ in range(150):
        mutated = bytearray(original)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            at = rng.choice(places[seed]) if rng.random() < 0.7 else rng.randrange(len(mutated))
            mutated[at] ^= 1 << rng.randrange(8)
        path.write_bytes(mutated)
        if passes(path):
            passed += 1
            assert victim.survives(path), victim.process.wait()
    assert passed, "nothing passed: the property was not put to the test"
