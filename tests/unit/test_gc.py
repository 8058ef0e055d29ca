"""Garbage collection: all that nobody needs, and nothing that somebody does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from dedupstore import format as fmt, gc as gc_module, staging
from dedupstore.check import check_store
from dedupstore.constants import CDC_BYTES_MIN, SEGMENT_BYTES
from dedupstore.env import DATABASES
from dedupstore.errors import ChunkDamagedError, StoreDamagedError
from dedupstore.imported import Imported
from dedupstore.leases import session_byte
from dedupstore.store import Store
from tests.conftest import (
    flip_record,
    flipped,
    import_bytes,
    keys_of,
    noise,
    opened,
    read_image,
    read_range,
)

Add = Callable[[str, bytes], Imported]
ROOT = Path(__file__).resolve().parents[2]

# Chunks of their own wherever they lie: each is one segment-aligned or hole-separated stretch.
PART_BYTES = CDC_BYTES_MIN  # the shortest chunk: a part is one
PARTS = [noise(seed, PART_BYTES) for seed in range(1, 9)]
GAP = bytes(4096)


def image_of(*numbers: int) -> bytes:
    """An image of some of the parts, holes between them, so that each part is cut the same way."""
    return b"".join(PARTS[number] + GAP for number in numbers)


def contents(store: Store) -> dict[str, list[tuple[bytes, bytes]]]:
    """Every record of the store."""
    found = {}
    with store.env.read() as txn:
        for name in DATABASES:
            cursor = txn.cursor(db=getattr(store.env, name))
            found[name] = [(bytes(key), bytes(value)) for key, value in cursor]
    return found


def test_gc_of_an_empty_store_does_nothing(store: Store) -> None:
    collected = store.collect_garbage()
    assert (collected.chunks, collected.manifests, collected.bytes) == (0, 0, 0)


def test_gc_without_garbage_changes_nothing(store: Store, add: Add) -> None:
    add("a", image_of(0, 1))
    before = contents(store)
    assert store.collect_garbage().chunks == 0
    assert contents(store) == before


def test_gc_after_rm_reclaims_everything(store: Store, add: Add) -> None:
    add("a", noise(1, 3 << 20))
    before = store.stats()
    store.remove(["a"])
    collected = store.collect_garbage()
    after = store.stats()
    assert collected.chunks == before.chunks > 0
    assert collected.bytes == before.stored_bytes
    assert collected.frames_removed == before.frames
    assert collected.manifests == 1
    assert (after.chunks, after.frames, after.unique_bytes, after.stored_bytes) == (0, 0, 0, 0)
    for name in ("frames", "chunks", "manifests", "images", "drafts"):
        assert keys_of(store, name) == []


def test_clone_keeps_what_its_original_had(store: Store, add: Add) -> None:
    data = image_of(0, 1, 2)
    add("a", data)
    store.clone("a", "b")
    store.remove(["a"])
    assert store.collect_garbage().chunks == 0
    assert read_image(store, "b") == data


def test_shared_chunks_stay_and_own_chunks_go(store: Store, add: Add) -> None:
    add("a", image_of(0, 1, 2, 3))
    add("b", image_of(2, 3, 4))
    store.remove(["a"])
    collected = store.collect_garbage()
    assert collected.chunks == 2
    assert collected.frames_rewritten == 1
    assert read_image(store, "b") == image_of(2, 3, 4)
    assert store.stats().unique_bytes == 3 * PART_BYTES


def test_rewritten_frames_keep_every_reference(store: Store, add: Add) -> None:
    add("a", image_of(*range(8)))
    add("b", image_of(1, 3, 5))
    add("c", image_of(7, 3))
    with store.env.read() as txn:
        before = {
            key: bytes(txn.get(key, db=store.env.manifests)) for key in keys_of(store, "manifests")
        }
    store.remove(["a"])
    stored = store.stats().stored_bytes
    collected = store.collect_garbage()
    assert store.stats().stored_bytes == stored - collected.bytes
    with store.env.read() as txn:
        for key in keys_of(store, "manifests"):
            assert bytes(txn.get(key, db=store.env.manifests)) == before[key]
    assert read_image(store, "b") == image_of(1, 3, 5)
    assert read_image(store, "c") == image_of(7, 3)
    add("a", image_of(*range(8)))
    assert read_image(store, "a") == image_of(*range(8))


def test_frame_rewritten_twice_still_serves_its_last_chunk(store: Store, add: Add) -> None:
    add("a", image_of(*range(8)))
    add("b", image_of(1, 6))
    add("c", image_of(6))
    for name in ("a", "b"):
        store.remove([name])
        store.collect_garbage()
        assert read_image(store, "c") == image_of(6)
    store.remove(["c"])
    store.collect_garbage()
    assert store.stats().frames == 0


def test_reader_with_a_cached_frame_survives_its_rewriting(store: Store, add: Add) -> None:
    add("a", image_of(*range(8)))
    add("b", image_of(1, 6))
    with opened(store, "b") as reader:
        assert read_range(reader, 0, PART_BYTES) == PARTS[1]
        store.remove(["a"])
        store.collect_garbage()
        assert read_range(reader, 0, reader.manifest.size) == image_of(1, 6)


def test_unneeded_manifests_are_removed(store: Store, add: Add) -> None:
    add("a", image_of(0, 1))
    add("b", image_of(0, 1, 0))  # of the same chunks
    store.remove(["b"])
    collected = store.collect_garbage()
    assert (collected.manifests, collected.chunks) == (1, 0)
    assert len(keys_of(store, "manifests")) == 1
    assert read_image(store, "a") == image_of(0, 1)


def test_frame_numbers_are_never_used_again(store: Store, add: Add) -> None:
    seen: set[bytes] = set()
    for _ in range(3):
        add("a", noise(1, 1 << 20))
        frames = set(keys_of(store, "frames"))
        assert frames
        assert not frames & seen
        seen |= frames
        store.remove(["a"])
        store.collect_garbage()


def test_second_gc_finds_nothing(store: Store, add: Add) -> None:
    add("a", image_of(0, 1, 2, 3))
    add("b", image_of(3))
    store.remove(["a"])
    store.collect_garbage()
    before = contents(store)
    again = store.collect_garbage()
    assert (again.chunks, again.bytes, again.frames_removed, again.frames_rewritten) == (0,) * 4
    assert contents(store) == before


@pytest.mark.parametrize("kept", [(), (3,), tuple(range(8))])
def test_dry_run_changes_nothing_and_agrees(store: Store, add: Add, kept: tuple[int, ...]) -> None:
    add("a", image_of(*range(8)))
    add("garbage", noise(99, 1 << 20))
    if kept:
        add("kept", image_of(*kept))
    store.remove(["a", "garbage"])
    before = contents(store)
    promised = store.collect_garbage(dry_run=True)
    assert contents(store) == before
    assert promised.dry_run
    done = store.collect_garbage()
    for count in ("manifests", "drafts", "chunks", "frames_removed", "frames_rewritten"):
        assert getattr(promised, count) == getattr(done, count)
    assert promised.bytes == pytest.approx(done.bytes, rel=0.1)


def test_progress_reaches_its_total(store: Store, add: Add) -> None:
    add("a", noise(1, 2 << 20))
    store.remove(["a"])
    steps: list[tuple[int, int]] = []
    store.collect_garbage(on_progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 0


def test_sweep_in_many_small_transactions_reclaims_the_same(
    store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc_module, "GC_DELETE_FRAMES", 1)
    monkeypatch.setattr(gc_module, "_REWRITE_FRAMES", 1)
    add("a", image_of(*range(8)) + noise(9, 2 << 20))
    add("b", image_of(2))
    store.remove(["a"])
    store.collect_garbage()
    assert store.stats().chunks == 1
    assert read_image(store, "b") == image_of(2)


# --- leases ---


def test_open_image_stays_readable_when_its_name_is_gone(store: Store, add: Add) -> None:
    data = noise(1, 2 << 20)
    add("a", data)
    with opened(store, "a", 1) as reader:
        store.remove(["a"])
        assert store.collect_garbage().chunks == 0
        assert read_range(reader, 0, len(data)) == data
    assert store.collect_garbage().chunks > 0


CHILD = """
import sys
from pathlib import Path
from dedupstore.store import Store
from tests.conftest import opened, read_range
from blake3 import blake3

with Store(Path(sys.argv[1])) as store, opened(store, "a", 1) as reader:
    print("open", flush=True)
    sys.stdin.readline()
    print(blake3(read_range(reader, 0, reader.manifest.size)).hexdigest(), flush=True)
"""


def test_image_open_in_another_process_stays_readable(store: Store, add: Add) -> None:
    data = noise(1, 2 << 20)
    add("a", data)
    command = [sys.executable, "-c", CHILD, str(store.path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        store.remove(["a"])
        assert store.collect_garbage().chunks == 0
        out, _ = child.communicate("read\n")
    assert out.strip() == blake3(data).hexdigest()
    assert child.returncode == 0
    assert store.collect_garbage().chunks > 0


def test_process_that_is_killed_leaves_no_lease(store: Store, add: Add) -> None:
    add("a", noise(1, 1 << 20))
    command = [sys.executable, "-c", CHILD, str(store.path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        child.kill()
    store.remove(["a"])
    assert store.collect_garbage().chunks > 0
    assert store.stats().chunks == 0


def test_lease_is_given_back_when_the_image_is_not_found(store: Store, add: Add) -> None:
    add("a", image_of(0))
    manifest = store.open_manifest("a")
    store.remove(["a"])
    store.close_manifest(manifest)
    assert store.collect_garbage().chunks == 1
    assert store.leases._held == {}


# --- drafts and running imports ---


def test_draft_of_a_live_import_is_kept(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BATCH_BYTES", 1 << 20)
    data = noise(1, 6 * SEGMENT_BYTES)
    (tmp_path / "image").write_bytes(data)
    found = []

    def meanwhile(_done: int, _total: int) -> None:
        drafts = len(keys_of(store, "drafts"))
        collected = store.collect_garbage()
        found.append((drafts, collected.drafts, collected.chunks))

    imported = store.import_path(tmp_path / "image", "image", meanwhile)[1]
    assert max(drafts for drafts, _, _ in found) > 0
    assert {(gone, chunks) for _, gone, chunks in found} == {(0, 0)}
    assert read_image(store, "image") == data
    assert store.stats().chunks == imported.new_chunks


def test_draft_of_a_dead_import_is_reclaimed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BATCH_BYTES", 1 << 20)
    (tmp_path / "image").write_bytes(noise(1, 6 * SEGMENT_BYTES))

    def die(_done: int, _total: int) -> None:
        if keys_of(store, "drafts"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.import_path(tmp_path / "image", "image", die)
    drafts = len(keys_of(store, "drafts"))
    assert drafts > 0
    assert store.stats().chunks > 0
    promised = store.collect_garbage(dry_run=True)
    collected = store.collect_garbage()
    assert promised.drafts == collected.drafts == drafts
    assert promised.chunks == collected.chunks
    assert keys_of(store, "drafts") == []
    assert store.stats().chunks == 0


def test_working_directory_of_a_dead_import_is_removed(store: Store) -> None:
    work = store.path / "tmp" / ("0123456789abcdef" * 2)
    (work / "tree").mkdir(parents=True)
    other = store.path / "tmp" / "keep me"
    other.mkdir()
    store.collect_garbage(dry_run=True)
    assert work.exists()
    store.collect_garbage()
    assert not work.exists()
    assert other.exists()


def test_working_directory_of_a_live_import_is_kept(store: Store) -> None:
    session = bytes(range(16))
    work = store.path / "tmp" / session.hex()
    work.mkdir()
    store.leases.take(session_byte(session))
    store.collect_garbage()
    assert work.exists()
    store.leases.release(session_byte(session))


@pytest.mark.parametrize("stored_again", [False, True], ids=["gone", "elsewhere"])
def test_gc_between_look_up_and_commit_still_gives_a_right_image(
    store: Store, add: Add, tmp_path: Path, stored_again: bool
) -> None:
    """The worker found the chunks stored; by the commit a gc has reclaimed them."""
    data = noise(1, 2 * SEGMENT_BYTES)
    add("first", data)
    (tmp_path / "image").write_bytes(data)
    collected = []

    def meanwhile(_done: int, _total: int) -> None:
        if not collected:
            store.remove(["first"])
            collected.append(store.collect_garbage().chunks)
            if stored_again:
                import_bytes(store, tmp_path, "third", data[SEGMENT_BYTES:])

    store.import_path(tmp_path / "image", "image", meanwhile)
    assert collected[0] > 0
    assert read_image(store, "image") == data


def test_gc_between_look_up_and_a_batch_keeps_what_the_draft_names(
    store: Store, add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BATCH_BYTES", 1 << 20)
    old, new = noise(1, SEGMENT_BYTES), noise(2, 4 * SEGMENT_BYTES)
    add("first", old)
    (tmp_path / "image").write_bytes(old + new)

    def meanwhile(_done: int, _total: int) -> None:
        if "first" in store.names() and keys_of(store, "drafts"):
            store.remove(["first"])
            assert store.collect_garbage().chunks == 0

    store.import_path(tmp_path / "image", "image", meanwhile)
    assert "first" not in store.names()
    assert read_image(store, "image") == old + new


def test_image_added_while_gc_sweeps_is_kept(
    store: Store, add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked as garbage, then needed again, before the sweep has come to it."""
    data = image_of(*range(8))
    add("old", data)
    store.remove(["old"])
    sweep = gc_module.Collector._sweep

    def late(self: gc_module.Collector, *arguments: object) -> None:
        import_bytes(store, tmp_path, "new", data)
        import_bytes(store, tmp_path, "part", image_of(5))
        store.remove(["new"])
        sweep(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gc_module.Collector, "_sweep", late)
    store.collect_garbage()
    assert read_image(store, "part") == image_of(5)


def test_image_opened_while_gc_sweeps_is_kept(
    store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise(1, 1 << 20)
    add("old", data)
    sweep = gc_module.Collector._sweep
    with_lease = []

    def late(self: gc_module.Collector, *arguments: object) -> None:
        store.clone("old2", "again")
        with_lease.append(store.open_manifest("again"))
        store.remove(["again", "old2"])
        sweep(self, *arguments)  # type: ignore[arg-type]

    store.rename("old", "old2")
    with monkeypatch.context() as patch:
        patch.setattr(gc_module.Collector, "_sweep", late)
        assert store.collect_garbage().chunks == 0
    store.close_manifest(with_lease[0])
    assert store.collect_garbage().chunks > 0


def test_two_collections_at_once_reclaim_each_thing_once(
    store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("a", image_of(*range(8)))
    add("b", image_of(2))
    store.remove(["a"])
    sweep = gc_module.Collector._sweep
    inner = []

    def late(self: gc_module.Collector, *arguments: object) -> None:
        if not inner:
            inner.append(None)
            inner.append(store.collect_garbage())
        sweep(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gc_module.Collector, "_sweep", late)
    outer = store.collect_garbage()
    assert inner[1].chunks == 7
    assert outer.chunks == 0
    assert read_image(store, "b") == image_of(2)


# --- damage ---


@pytest.mark.damaged
@pytest.mark.parametrize("bit", [64, 8 * 10, 8 * 13, 8 * 16 + 1, 8 * (16 + 32), 8 * (16 + 35) + 6])
def test_gc_never_leaves_the_index_pointing_at_a_damaged_frame_it_removed(
    store: Store, add: Add, bit: int
) -> None:
    """Codec, slot count, length, a digest, a slot's length and state: a dead frame's header is what
    tells gc which index entries go with it."""
    data = image_of(*range(4))
    add("a", data)
    store.remove(["a"])
    (key,) = keys_of(store, "frames")
    flip_record(store, "frames", key, bit)
    refusal = None
    try:
        store.collect_garbage()
    except StoreDamagedError as error:
        refusal = str(error)
    if refusal is None:
        add_again(store, store.path.parent, data)
        return
    assert "dedupstore check" in refusal
    store.close()
    assert check_store(store.path, repair=True).findings
    with Store(store.path) as reopened:
        reopened.collect_garbage()
        add_again(reopened, store.path.parent, data)


def add_again(store: Store, directory: Path, data: bytes) -> None:
    import_bytes(store, directory, "b", data)
    assert read_image(store, "b") == data


@pytest.mark.damaged
def test_gc_does_not_rewrite_a_damaged_frame(store: Store, add: Add) -> None:
    add("a", image_of(0, 1, 2))
    add("b", image_of(1))
    store.remove(["a"])
    key = keys_of(store, "frames")[0]
    flip_record(store, "frames", key, -1)
    before = contents(store)["frames"]
    with pytest.raises(ChunkDamagedError):
        store.collect_garbage()
    assert contents(store)["frames"] == before


@pytest.mark.damaged
def test_gc_refuses_to_judge_by_a_damaged_manifest(store: Store, add: Add) -> None:
    add("a", image_of(0, 1))
    (digest,) = keys_of(store, "manifests")
    flip_record(store, "manifests", digest, 300)
    before = contents(store)
    with pytest.raises(StoreDamagedError):
        store.collect_garbage()
    assert contents(store) == before


@pytest.mark.damaged
def test_chunk_stored_twice_after_damage_survives_gc_of_one_copy(store: Store, add: Add) -> None:
    """A flipped bit in an index key hides a chunk, so that the next import stores it again."""
    add("a", image_of(0))
    (digest,) = keys_of(store, "chunks")
    with store.env.write() as txn:
        value = bytes(txn.get(digest, db=store.env.chunks))
        txn.delete(digest, db=store.env.chunks)
        txn.put(flipped(digest, 3), value, db=store.env.chunks)
    add("b", image_of(0) + GAP)
    store.close()
    assert check_store(store.path, repair=True).findings
    assert check_store(store.path).findings == ()
    with Store(store.path) as reopened:
        for name in ("a", "b"):
            assert read_image(reopened, name).startswith(PARTS[0])
        reopened.remove(["a"])
        reopened.collect_garbage()
        assert read_image(reopened, "b") == image_of(0) + GAP
        import_bytes(reopened, store.path.parent, "c", image_of(0))
        assert read_image(reopened, "c") == image_of(0)
    assert check_store(store.path).findings == ()


def test_manifest_counts_bits_of_long_runs(store: Store, tmp_path: Path) -> None:
    """A run of many slots marks each of them."""
    data = noise(1, 3 << 20)
    import_bytes(store, tmp_path, "a", data)
    marks = gc_module._Marks()
    manifest = store.open_manifest("a")
    with store.env.read() as txn:
        record = fmt.decode_manifest(
            bytes(txn.get(manifest.digest, db=store.env.manifests)), manifest.digest
        )
    store.close_manifest(manifest)
    marks.add_manifest(record)
    assert sum(mask.bit_count() for mask in marks.live.values()) == store.stats().chunks
