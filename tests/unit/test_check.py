"""Scrub and repair: each kind of damage is found, named, and mended where it can be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dedupstore import format as fmt, staging
from dedupstore.check import Checked, Finding, check_store
from dedupstore.constants import SEGMENT_BYTES
from dedupstore.env import DATA_FILE
from dedupstore.errors import (
    ChunkDamagedError,
    DedupError,
    StoreDamagedError,
    StoreNotFoundError,
)
from dedupstore.frames import TOTALS_KEY
from dedupstore.imported import Imported
from dedupstore.pages import verify_header
from dedupstore.store import Store
from tests.conftest import (
    blocks,
    flip_record,
    flipped,
    import_bytes,
    keys_of,
    noise,
    read_image,
)

Add = Callable[[str, bytes], Imported]

pytestmark = pytest.mark.damaged

# Two frames' worth before the hole, and something behind it.
DATA = noise(1, 500_000 // 4096 * 4096) + bytes(8192) + noise(2, 20_000)


def checked(store: Store, *, repair: bool = False) -> Checked:
    store.close()
    return check_store(store.path, repair=repair)


def reopened(store: Store) -> Store:
    store.close()
    return Store(store.path)


def only(found: Checked) -> Finding:
    assert len(found.findings) == 1, found.findings
    return found.findings[0]


def test_sound_store_has_no_findings_and_counts(store: Store, add: Add) -> None:
    add("a", DATA)
    store.clone("a", "b")
    stats = store.stats()
    found = checked(store)
    assert found.intact
    assert found.findings == ()
    assert (found.images, found.chunks, found.frames) == (2, stats.chunks, stats.frames)
    assert found.bytes == stats.unique_bytes
    assert found.pages > 2


def test_empty_store_is_sound(store: Store) -> None:
    assert checked(store).findings == ()


def test_repair_of_a_sound_store_changes_nothing(store: Store, add: Add) -> None:
    add("a", DATA)
    store.close()
    before = (store.path / DATA_FILE).read_bytes()
    assert check_store(store.path, repair=True).intact
    assert (store.path / DATA_FILE).read_bytes() == before


def test_progress_reaches_its_total(store: Store, add: Add) -> None:
    add("a", DATA)
    store.close()
    steps: list[tuple[int, int]] = []
    check_store(store.path, on_progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 0


def test_check_of_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        check_store(tmp_path / "nothing")


# --- frames ---


@pytest.mark.parametrize(
    "bit", [0, 64, 80, 100, 8 * 16 + 5, 8 * (16 + 33), -1], ids=lambda bit: f"bit{bit}"
)
def test_damaged_frame_names_image_offset_and_chunk(store: Store, add: Add, bit: int) -> None:
    add("a", DATA)
    last = keys_of(store, "frames")[-1]
    flip_record(store, "frames", last, bit)
    found = checked(store)
    assert not found.intact
    hurt = [finding for finding in found.findings if finding.what == "chunk"]
    frame = fmt.decode_frame_key(last)
    assert hurt
    for finding in hurt:
        assert finding.image == "a"
        assert finding.offset is not None
        assert 0 < finding.offset < len(DATA)
        assert finding.chunk is not None
        assert finding.chunk.startswith(f"{frame}.")
        assert finding.reason


def test_damage_is_named_for_every_image_that_reads_it(store: Store, add: Add) -> None:
    add("a", DATA)
    add("b", noise(3, SEGMENT_BYTES) + DATA)
    store.clone("a", "c")
    flip_record(store, "frames", keys_of(store, "frames")[0], -1)
    found = checked(store)
    offsets = {f.image: f.offset for f in reversed(found.findings)}
    assert offsets == {"a": 0, "b": SEGMENT_BYTES, "c": 0}


def test_damage_that_no_image_reads_is_found(store: Store, add: Add) -> None:
    """The next import of this content would rely on it."""
    add("a", DATA)
    store.remove(["a"])
    store.collect_garbage()
    add("a", DATA)
    add("b", blocks(1))
    store.remove(["a"])
    with store.env.write() as txn:
        for digest in keys_of(store, "manifests"):
            txn.delete(digest, db=store.env.manifests)
        txn.delete(b"b", db=store.env.images)
    first = keys_of(store, "frames")[0]
    flip_record(store, "frames", first, -1)
    finding = only(checked(store))
    assert (finding.what, finding.chunk) == ("frames", str(fmt.decode_frame_key(first)))
    assert check_store(store.path, repair=True).intact
    assert check_store(store.path).findings == ()
    with Store(store.path) as again:
        import_bytes(again, store.path.parent, "a", DATA)
        assert read_image(again, "a") == DATA


def test_sealed_frame_with_wrong_contents_is_found(store: Store, add: Add) -> None:
    """A record whose checksum is right and whose bytes are not its chunks'."""
    add("a", noise(1))
    (key,) = keys_of(store, "frames")
    with store.env.write() as txn:
        record = bytearray(txn.get(key, db=store.env.frames))
        record[-1] ^= 1
        fmt.seal_frame(record, fmt.decode_frame_key(key))
        txn.put(key, bytes(record), db=store.env.frames)
    finding = only(checked(store))
    assert (finding.image, finding.offset, finding.reason) == (
        "a",
        0,
        "slot 0 does not have its digest",
    )


def test_missing_frame_is_found(store: Store, add: Add) -> None:
    add("a", DATA)
    key = keys_of(store, "frames")[0]
    with store.env.write() as txn:
        txn.delete(key, db=store.env.frames)
    found = checked(store)
    assert {"chunk", "index", "totals"} <= {finding.what for finding in found.findings}
    hurt = next(finding for finding in found.findings if finding.what == "chunk")
    assert (hurt.image, hurt.offset) == ("a", 0)
    assert "missing" in hurt.reason


@pytest.mark.parametrize("key", [b"12345", fmt.frame_key(1 << 60)], ids=["short", "far"])
def test_stray_frame_is_found_mended_and_never_swallows_an_import(
    store: Store, add: Add, tmp_path: Path, key: bytes
) -> None:
    add("a", DATA)
    with store.env.write() as txn:
        record = bytes(txn.get(keys_of(store, "frames")[0], db=store.env.frames))
        txn.put(key, record, db=store.env.frames)
    # LMDB appends nothing behind it, and does not raise.
    with pytest.raises(StoreDamagedError, match="check --repair"):
        add("b", noise(5, 100_000))
    assert store.names() == ["a"]
    assert checked(store).findings
    check_store(store.path, repair=True)
    assert check_store(store.path).findings == ()
    with Store(store.path) as again:
        import_bytes(again, tmp_path, "c", noise(6, 100_000))
        assert read_image(again, "c") == noise(6, 100_000)
        assert read_image(again, "a") == DATA


# --- index and totals ---


def test_damaged_index_entry_is_found_and_mended(store: Store, add: Add) -> None:
    add("a", DATA)
    flip_record(store, "chunks", keys_of(store, "chunks")[3], 5)
    finding = next(f for f in checked(store).findings if f.chunk)
    assert finding.what == "index"
    assert "." in str(finding.chunk)
    mended = check_store(store.path, repair=True)
    assert mended.intact
    assert all(finding.mended for finding in mended.findings)
    assert check_store(store.path).findings == ()


def test_missing_index_entry_is_found_and_mended(store: Store, add: Add) -> None:
    imported = add("a", DATA)
    digest = keys_of(store, "chunks")[0]
    with store.env.write() as txn:
        txn.delete(digest, db=store.env.chunks)
    finding = only(checked(store))
    assert (finding.what, finding.reason) == ("index", "does not know a stored chunk")
    assert check_store(store.path, repair=True).intact
    with Store(store.path) as again:
        assert len(keys_of(again, "chunks")) == imported.new_chunks
    assert check_store(store.path).findings == ()


def test_index_entry_under_a_flipped_key_is_found_and_mended(store: Store, add: Add) -> None:
    add("a", DATA)
    digest = keys_of(store, "chunks")[0]
    with store.env.write() as txn:
        value = bytes(txn.get(digest, db=store.env.chunks))
        txn.delete(digest, db=store.env.chunks)
        txn.put(flipped(digest, 200), value, db=store.env.chunks)
    assert len(checked(store).findings) == 2
    assert check_store(store.path, repair=True).intact
    assert check_store(store.path).findings == ()


def test_index_entry_that_leads_nowhere_is_found_and_mended(store: Store, add: Add) -> None:
    add("a", DATA)
    digest = b"x" * 32
    with store.env.write() as txn:
        value = fmt.encode_index(digest, fmt.make_ref(999, 0))
        txn.put(digest, value, db=store.env.chunks)
    assert only(checked(store)).chunk == "999"
    assert check_store(store.path, repair=True).intact
    assert check_store(store.path).findings == ()


@pytest.mark.parametrize("damage", ["flip", "remove", "wrong"])
def test_damaged_totals_are_found_and_mended(store: Store, add: Add, damage: str) -> None:
    add("a", DATA)
    stats = store.stats()
    frames = keys_of(store, "frames")
    if damage == "flip":
        flip_record(store, "meta", TOTALS_KEY, 70)
    else:
        with store.env.write() as txn:
            if damage == "remove":
                txn.delete(TOTALS_KEY, db=store.env.meta)
            else:
                txn.put(TOTALS_KEY, fmt.encode_totals(fmt.Totals(99)), db=store.env.meta)
    assert only(checked(store)).what == "totals"
    assert check_store(store.path, repair=True).intact
    assert check_store(store.path).findings == ()
    with Store(store.path) as again:
        assert again.stats().unique_bytes == stats.unique_bytes
        assert again.stats().stored_bytes == stats.stored_bytes
        import_bytes(again, store.path.parent, "b", noise(9, 300_000))
        assert set(keys_of(again, "frames")) > set(frames)
        assert read_image(again, "a") == DATA
        assert read_image(again, "b") == noise(9, 300_000)


# --- images, manifests, drafts ---


def test_damaged_image_record_names_the_image(store: Store, add: Add) -> None:
    add("a", blocks(1))
    flip_record(store, "images", b"a", 300)
    finding = only(checked(store))
    assert (finding.what, finding.image) == ("images", "a")


@pytest.mark.parametrize("bit", [3, 100, 200, -1])
def test_damaged_manifest_names_the_image(store: Store, add: Add, bit: int) -> None:
    add("a", blocks(1, 0, 2))
    flip_record(store, "manifests", keys_of(store, "manifests")[0], bit)
    finding = only(checked(store))
    assert (finding.what, finding.image) == ("manifests", "a")


def test_missing_manifest_names_the_image(store: Store, add: Add) -> None:
    add("a", blocks(1))
    with store.env.write() as txn:
        txn.delete(keys_of(store, "manifests")[0], db=store.env.manifests)
    finding = only(checked(store))
    assert (finding.image, finding.reason) == ("a", "has no manifest")


def test_manifest_of_other_contents_is_found(store: Store, add: Add) -> None:
    """Sealed under this digest, and made of other chunks."""
    add("a", blocks(1))
    add("b", blocks(2))
    digests = {image.name: bytes.fromhex(image.digest) for image in store.images()}
    with store.env.write() as txn:
        other = fmt.decode_manifest(
            bytes(txn.get(digests["b"], db=store.env.manifests)), digests["b"]
        )
        record = fmt.encode_manifest(other, digests["a"])
        txn.put(digests["a"], record, db=store.env.manifests)
    finding = only(checked(store))
    assert (finding.image, finding.what) == ("a", "manifests")
    assert "digest" in finding.reason


def test_damaged_draft_is_found(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BATCH_BYTES", 1 << 20)
    (tmp_path / "image").write_bytes(noise(1, 6 * SEGMENT_BYTES))

    def die(_done: int, _total: int) -> None:
        if keys_of(store, "drafts"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.import_path(tmp_path / "image", "image", die)
    flip_record(store, "drafts", keys_of(store, "drafts")[0], 70)
    assert only(checked(store)).what == "drafts"


def test_drafts_of_running_imports_are_no_damage(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BATCH_BYTES", 1 << 20)
    (tmp_path / "image").write_bytes(noise(1, 6 * SEGMENT_BYTES))

    def die(_done: int, _total: int) -> None:
        if keys_of(store, "drafts"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.import_path(tmp_path / "image", "image", die)
    assert checked(store).findings == ()


def test_damaged_pages_are_findings_and_lmdb_is_not_started(
    store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("a", noise(1, 3 << 20))
    store.close()
    path = store.path / DATA_FILE
    verify_header(path)
    with path.open("r+b") as file:
        for page in range(2, path.stat().st_size // 4096):
            file.seek(page * 4096 + 10)
            flags = int.from_bytes(file.read(2), "little")
            if flags == 4:  # the first page of an overflow run, and whatever looks like one
                file.seek(page * 4096)
                file.write(b"\xff" * 8)  # its own number
    monkeypatch.setattr("dedupstore.check.run.Environment", None)  # opening it would fail
    found = check_store(path.parent)
    assert found.findings
    assert {finding.what.split()[0] for finding in found.findings} == {"page"}
    assert not found.intact


def test_truncated_store_is_reported(store: Store, add: Add) -> None:
    add("a", DATA)
    store.close()
    os.truncate(store.path / DATA_FILE, 100_000)
    found = None
    with contextlib.suppress(DedupError):
        found = check_store(store.path)
    assert found is None or found.findings


# --- repair ---


@pytest.mark.parametrize("bit", [0, 64, 80, 100, 8 * 16 + 5, 8 * (16 + 33)])
def test_damage_to_what_surrounds_the_chunks_of_a_frame_is_mended_from_the_frame(
    store: Store, add: Add, bit: int
) -> None:
    """Checksum, codec, number of slots, length, a digest, a slot's length."""
    add("a", DATA)
    flip_record(store, "frames", keys_of(store, "frames")[0], bit)
    mended = checked(store, repair=True)
    assert mended.intact
    assert mended.findings
    assert check_store(store.path).findings == ()
    with Store(store.path) as again:
        assert read_image(again, "a") == DATA


@pytest.mark.parametrize("bit", [-1, -30_000])
def test_after_repair_the_same_content_imports_into_a_good_image(
    store: Store, add: Add, tmp_path: Path, bit: int
) -> None:
    add("a", DATA)
    first = keys_of(store, "frames")[0]
    flip_record(store, "frames", first, bit)
    mended = checked(store, repair=True)
    assert not mended.intact  # the image has lost something
    assert all(f.mended for f in mended.findings if f.what in ("index", "totals"))
    again = check_store(store.path)
    assert {finding.what for finding in again.findings} == {"chunk"}
    assert {finding.image for finding in again.findings} == {"a"}
    with Store(store.path) as mended_store:
        with pytest.raises(ChunkDamagedError):
            read_image(mended_store, "a")
        import_bytes(mended_store, tmp_path, "b", DATA)
        assert read_image(mended_store, "b") == DATA
        assert read_image(mended_store, "a") == DATA  # the same image: it is whole again
        mended_store.collect_garbage()
        assert read_image(mended_store, "b") == DATA
    assert check_store(store.path).findings == ()


def test_after_repair_content_in_another_image_is_stored_anew(
    store: Store, add: Add, tmp_path: Path
) -> None:
    shared = noise(1, SEGMENT_BYTES)
    add("a", shared)
    flip_record(store, "frames", keys_of(store, "frames")[2], -1)
    checked(store, repair=True)
    with Store(store.path) as again:
        import_bytes(again, tmp_path, "b", shared + noise(2, 100_000))
        assert read_image(again, "b") == shared + noise(2, 100_000)
        again.remove(["a"])
        again.collect_garbage()
        assert read_image(again, "b") == shared + noise(2, 100_000)
    assert check_store(store.path).findings == ()


def test_repair_of_frame_and_index_together_leaves_errors_that_name_the_chunk(
    store: Store, add: Add, tmp_path: Path
) -> None:
    add("a", DATA)
    first = keys_of(store, "frames")[0]
    with store.env.write() as txn:
        for digest in keys_of(store, "chunks"):
            txn.delete(digest, db=store.env.chunks)
    flip_record(store, "frames", first, -1)
    checked(store, repair=True)
    with Store(store.path) as again:
        with pytest.raises(ChunkDamagedError, match="'a'"):
            read_image(again, "a")
        import_bytes(again, tmp_path, "b", DATA)
        assert read_image(again, "b") == DATA
        again.remove(["a", "b"])
        again.collect_garbage()
        assert again.stats().chunks == 0
    assert check_store(store.path).findings == ()


def test_gc_after_repair_reclaims_the_quarantined_frame(store: Store, add: Add) -> None:
    add("a", DATA)
    flip_record(store, "frames", keys_of(store, "frames")[0], -1)
    checked(store, repair=True)
    with reopened(store) as again:
        again.remove(["a"])
        again.collect_garbage()
        assert keys_of(again, "frames") == keys_of(again, "chunks") == []
        assert again.stats().stored_bytes == 0
    assert check_store(store.path).findings == ()
