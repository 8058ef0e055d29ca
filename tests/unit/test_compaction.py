"""Compaction: free pages go back to the file system, and nothing else does."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dedupstore import compaction, format as fmt, holes
from dedupstore.check import check_store
from dedupstore.env import DATA_FILE
from dedupstore.errors import StoreAccessError
from dedupstore.imported import Imported
from dedupstore.pages import read_free_pages, verify_pages
from dedupstore.store import Store
from tests.conftest import import_bytes, keys_of, noise, read_image
from tests.programs import require_root

Add = Callable[[str, bytes], Imported]
PAGE = 4096
BIG = noise(1, 6 << 20)
SMALL = noise(2, 1 << 20)
# A store's own trees, and the pages that its last commit gave up.
LITTLE = 40 * PAGE


@pytest.fixture
def spent(store: Store, add: Add) -> Store:
    """A store whose file has room for `big`, of which only `small` is left."""
    add("big", BIG)
    add("small", SMALL)
    store.remove(["big"])
    store.collect_garbage()
    return store


def test_space_that_gc_reclaimed_goes_back_to_the_file_system(spent: Store) -> None:
    before = spent.stats()
    compacted = spent.compact()
    after = spent.stats()
    assert compacted.bytes == before.file_bytes - after.file_bytes > len(BIG)
    assert after.file_bytes < after.stored_bytes + LITTLE
    assert after.file_length >= before.file_length
    assert read_image(spent, "small") == SMALL


def test_what_the_last_commit_gave_up_goes_back_too(store: Store, add: Add) -> None:
    add("big", BIG)
    with store.env.write() as txn:  # all at once, nothing after it
        for frame in keys_of(store, "frames"):
            txn.delete(frame, db=store.env.frames)
        for digest in keys_of(store, "chunks"):
            txn.delete(digest, db=store.env.chunks)
        txn.delete(keys_of(store, "manifests")[0], db=store.env.manifests)
        txn.delete(b"big", db=store.env.images)
        txn.put(b"totals", fmt.encode_totals(fmt.Totals(frame_next=1000)), db=store.env.meta)
    assert store.compact().bytes > len(BIG)


def test_compacting_twice_finds_next_to_nothing(spent: Store) -> None:
    spent.compact()
    assert spent.compact().bytes < LITTLE


def test_compacted_file_is_used_again_by_imports(spent: Store, add: Add) -> None:
    length = spent.stats().file_length
    spent.compact()
    add("again", BIG)
    assert spent.stats().file_length < length + len(BIG) // 8
    assert read_image(spent, "again") == BIG
    assert read_image(spent, "small") == SMALL


def test_pages_that_a_reader_can_see_keep_their_content(store: Store, add: Add) -> None:
    add("big", BIG)
    with store.env.read() as snapshot:
        cursor = snapshot.cursor(db=store.env.frames)
        records = [(key, bytes(value)) for key, value in cursor]
        store.remove(["big"])
        store.collect_garbage()
        compacted = store.compact()
        assert compacted.bytes_held > len(BIG)
        for key, record in records:
            assert snapshot.get(key, db=store.env.frames) == record
    compacted = store.compact()
    assert compacted.bytes > len(BIG)
    assert compacted.bytes_held == 0


READER_OF_ANOTHER_PROCESS = """\
import sys
from pathlib import Path
from dedupstore.store import Store
with Store(Path(sys.argv[1])) as store, store.env.read():
    print("reading", flush=True)
    sys.stdin.read()
"""


def test_reader_of_another_process_counts_until_it_is_dead(store: Store, add: Add) -> None:
    add("big", BIG)
    with subprocess.Popen(
        [sys.executable, "-c", READER_OF_ANOTHER_PROCESS, store.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"reading\n"
        store.remove(["big"])
        store.collect_garbage()
        assert store.compact().bytes_held > len(BIG)
        reader.kill()
        reader.wait()
        assert store.compact().bytes > len(BIG)


def fall_back(path: Path) -> None:
    """Leave the file as a power loss would that took the last meta page: the one before counts."""
    with path.open("r+b") as file:
        pages = [os.pread(file.fileno(), PAGE, at) for at in (0, PAGE)]
        numbers = [struct.unpack_from("<Q", page, 144)[0] for page in pages]
        newest = numbers.index(max(numbers))
        older = bytearray(pages[1 - newest])
        struct.pack_into("<Q", older, 0, newest)
        struct.pack_into("<Q", older, 144, max(numbers) - 2)
        os.pwrite(file.fileno(), older, newest * PAGE)


def test_snapshot_of_the_meta_page_before_the_last_is_whole(spent: Store, tmp_path: Path) -> None:
    spent.compact()
    copy = tmp_path / "copy"
    shutil.copytree(spent.path, copy)
    (copy / "lock.mdb").unlink()
    fall_back(copy / DATA_FILE)
    assert check_store(copy).findings == ()
    with Store(copy) as store:
        assert read_image(store, "small") == SMALL


def test_every_commit_around_a_compaction_leaves_sound_pages(store: Store, add: Add) -> None:
    for number in range(4):
        add(f"image-{number}", noise(10 + number, 700_000))
        store.clone(f"image-{number}", f"clone-{number}")
        store.remove([f"image-{number}"])
        if number % 2:
            store.remove([f"clone-{number - 1}"])
        store.collect_garbage()
        store.compact()
        assert verify_pages(store.env.path).findings == ()
    assert store.names() == ["clone-1", "clone-3"]
    for number in (1, 3):
        assert read_image(store, f"clone-{number}") == noise(10 + number, 700_000)


def test_writers_come_in_between_and_lose_nothing(
    store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "COMPACT_RUNS", 1)
    for number in range(8):
        add(f"{number}", noise(10 + number, 300_000))
    store.remove(["0", "2", "4", "6"])  # free pages in many pieces
    store.collect_garbage()
    written: dict[str, bytes] = {}

    def write(done: int, total: int) -> None:
        assert done <= total
        if done < total:
            data = noise(100 + len(written), 200_000)
            name = f"between-{len(written)}"
            add(name, data)
            written[name] = data

    compaction.compact(store.env, write)
    assert len(written) >= 3
    for number in (1, 3, 5, 7):
        assert read_image(store, f"{number}") == noise(10 + number, 300_000)
    for name, data in written.items():
        assert read_image(store, name) == data


def test_no_page_in_use_is_ever_handed_to_be_punched(
    spent: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "COMPACT_RUNS", 3)
    punched: set[int] = set()

    def note(file: int, offset: int, length: int) -> None:
        assert offset % PAGE == length % PAGE == 0
        pages = set(range(offset // PAGE, (offset + length) // PAGE))
        assert not pages & punched
        punched.update(pages)
        holes.punch(file, offset, length)

    monkeypatch.setattr(compaction, "punch", note)
    spent.compact()
    with spent.env.write() as txn:
        committed = txn.id() - 1
        free = read_free_pages(spent.env.path, committed=committed, before=committed)
    listed = {page for first, count in free.runs for page in range(first, first + count)}
    assert listed == punched
    assert free.held == 0


@pytest.fixture
def plain_directory(tmp_path: Path) -> Iterator[Path]:
    """On ramfs, which cannot punch holes."""
    require_root()
    with tempfile.TemporaryDirectory(dir=tmp_path) as directory:
        subprocess.run(["mount", "-t", "ramfs", "ramfs", directory], check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


def test_file_system_without_holes_is_refused_and_keeps_the_store(
    plain_directory: Path, tmp_path: Path
) -> None:
    with Store.create(plain_directory / "store") as store:
        import_bytes(store, tmp_path, "big", BIG)
        import_bytes(store, tmp_path, "small", SMALL)
        store.remove(["big"])
        store.collect_garbage()
        with pytest.raises(StoreAccessError, match="cannot punch holes"):
            store.compact()
        assert read_image(store, "small") == SMALL
    assert check_store(plain_directory / "store").findings == ()
