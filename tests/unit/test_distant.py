"""Frames whose bytes are in a remote: in the index, the totals, gc, check and its repair."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.check import Checked, check_store
from dedupstore.env import DATA_FILE
from dedupstore.errors import DedupError, StoreVersionError
from dedupstore.export import export_image
from dedupstore.frames import FrameWriter
from dedupstore.pages import verify_pages
from dedupstore.places import list_places
from dedupstore.remote.configuration import add_remote
from dedupstore.store import Store
from tests.conftest import (
    flip_record,
    import_bytes,
    keys_of,
    noise,
    opened,
    read_image,
    read_range,
    silent,
)
from tests.lazy import BASE, IMAGES, asked, distant_frames, make_remote, pack_files, pull, push


@pytest.fixture
def far(tmp_path: Path) -> Path:
    return make_remote(tmp_path)


@pytest.fixture
def lazy(store: Store, far: Path) -> Store:
    """A store with both images, nothing of whose contents is here."""
    add_remote(store.env, "far", [str(far)])
    for name in IMAGES:
        pull(store, name)
    return store


def checked(store: Store, *, repair: bool = False, sources: tuple[Path, ...] = ()) -> Checked:
    """Check a store that is open, which it is no longer afterwards."""
    store.close()
    return check_store(store.path, repair=repair, sources=sources)


def fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


def assert_intact(path: Path) -> None:
    assert check_store(path).findings == ()


def place_key(store: Store, at: int = 0) -> bytes:
    return fmt.frame_key(distant_frames(store)[at])


def hurt_places(store: Store, key: bytes, bits: tuple[int, ...]) -> None:
    remote = store.env.open_remote()
    with store.env.write() as txn:
        record = bytearray(txn.get(key, db=remote.places))
        for bit in bits:
            record[bit // 8] ^= 1 << bit % 8
        txn.put(key, bytes(record), db=remote.places)


# --- the index, totals and places after each change ---


def test_lazy_image_has_its_frames_in_the_totals_and_none_of_its_bytes(lazy: Store) -> None:
    stats = lazy.stats()
    assert (stats.unique_bytes, stats.chunks) == (0, 0)
    assert stats.frames > 10
    assert stats.distant_frames == stats.frames
    assert stats.distant_bytes >= lazy.missing_bytes("derived")
    assert stats.distant_bytes > 2_000_000
    assert checked(lazy).findings == ()


def test_filled_frame_is_indexed_as_present_and_no_longer_as_distant(lazy: Store) -> None:
    before = lazy.stats()
    frame = distant_frames(lazy)[0]
    record = bytearray(lazy.fetcher().fetch(frame))
    lazy.fetcher().keeper.flush()
    assert frame not in distant_frames(lazy)
    header = fmt.decode_frame_header(memoryview(record), frame)
    after = lazy.stats()
    assert after.unique_bytes - before.unique_bytes == header.raw_bytes
    assert before.distant_bytes - after.distant_bytes >= header.raw_bytes
    remote = lazy.env.open_remote()
    with lazy.env.read() as txn:
        for at, slot in enumerate(header.slots):
            assert txn.get(slot.digest, db=remote.distant) is None
            known = fmt.decode_index(slot.digest, txn.get(slot.digest, db=lazy.env.chunks))
            assert known == fmt.make_ref(frame, at)
    with lazy.env.write() as txn:
        writer = FrameWriter(txn, lazy.env)
        assert not writer.fill(frame, bytearray(record))  # a second time
        writer.close()
    assert checked(lazy).findings == ()


def test_emptied_frame_is_as_it_was_before_it_was_filled(lazy: Store) -> None:
    before = [lazy.stats(), keys_of(lazy, "chunks")]
    frame = distant_frames(lazy)[0]
    with lazy.env.read() as txn:
        distant = bytes(txn.get(fmt.frame_key(frame), db=lazy.env.frames))
    lazy.fetcher().fetch(frame)
    lazy.fetcher().keeper.flush()
    with lazy.env.write() as txn:
        writer = FrameWriter(txn, lazy.env)
        assert writer.empty(frame) > 0
        assert writer.empty(frame) == 0
        writer.close()
    with lazy.env.read() as txn:
        assert bytes(txn.get(fmt.frame_key(frame), db=lazy.env.frames)) == distant
    now = [lazy.stats(), keys_of(lazy, "chunks")]
    assert now[1] == before[1]
    assert now[0].stored_bytes == before[0].stored_bytes
    assert now[0].distant_bytes == before[0].distant_bytes
    assert checked(lazy).findings == ()


def test_chunk_in_two_slots_is_no_finding_whatever_comes_and_goes(
    lazy: Store, tmp_path: Path
) -> None:
    """Imported beside the lazy image, then filled, emptied and reclaimed in many orders."""
    rng = random.Random(5)
    for round_ in range(12):
        step = rng.choice(["import", "fill", "empty", "rm", "gc", "import"])
        if step == "import" and f"own{round_}" not in lazy.names():
            import_bytes(lazy, tmp_path, f"own{round_}", BASE[: rng.randrange(1, 40) * 40_000])
        elif step == "fill":
            for frame in rng.sample(distant_frames(lazy), min(3, len(distant_frames(lazy)))):
                lazy.fetcher().fetch(frame)
            lazy.fetcher().keeper.flush()
        elif step == "empty":
            remote = lazy.env.open_remote()
            with lazy.env.write() as txn:
                writer = FrameWriter(txn, lazy.env)
                for frame in [f for f, _ in list_places(txn, remote)][:: rng.randrange(1, 4)]:
                    writer.empty(frame)
                writer.close()
        elif step == "rm":
            own = [name for name in lazy.names() if name.startswith("own")]
            lazy.remove(own[:1])
        else:
            lazy.collect_garbage()
    for name, data in IMAGES.items():
        assert read_image(lazy, name) == data
    assert checked(lazy).findings == ()


# --- gc ---


def test_gc_reclaims_what_a_removed_lazy_image_leaves(lazy: Store) -> None:
    with opened(lazy, "base") as reader:
        read_range(reader, 0, 50_000)
    lazy.fetcher().keeper.flush()
    lazy.remove(["base", "derived"])
    estimated = lazy.collect_garbage(dry_run=True)
    collected = lazy.collect_garbage()
    assert collected.frames_removed == estimated.frames_removed > 10
    assert collected.bytes == estimated.bytes
    assert collected.chunks == estimated.chunks
    remote = lazy.env.open_remote()
    with lazy.env.read() as txn:
        for database in (lazy.env.frames, lazy.env.chunks, remote.places, remote.distant):
            assert lazy.env.entries(txn, database) == 0
    assert lazy.stats().stored_bytes == 0


def test_partly_dead_distant_frame_stays(lazy: Store, tmp_path: Path, far: Path) -> None:
    """Of what was pulled for one image, another needs a part."""
    with Store.create(tmp_path / "second") as second:
        add_remote(second.env, "far", [str(far)])
        import_bytes(second, tmp_path, "part", BASE[4096 * 3 : 4096 * 60])
        push(second, "part")
    pull(lazy, "part")
    lazy.remove(["base", "derived"])
    lazy.collect_garbage()
    assert distant_frames(lazy)
    assert read_image(lazy, "part") == BASE[4096 * 3 : 4096 * 60]
    assert lazy.collect_garbage().frames_removed == 0


def test_removed_lazy_image_that_is_open_goes_on_being_fetched(lazy: Store) -> None:
    with opened(lazy, "derived") as reader:
        lazy.remove(["base", "derived"])
        lazy.collect_garbage()
        assert read_range(reader, 0, len(IMAGES["derived"])) == IMAGES["derived"]
    lazy.fetcher().keeper.flush()
    lazy.collect_garbage()
    assert lazy.stats().frames == 0


# --- check and repair ---


@pytest.mark.damaged
def test_flipped_place_record_is_found_with_what_a_reader_loses_and_mended(lazy: Store) -> None:
    hurt_places(lazy, place_key(lazy), (200,))
    found = checked(lazy)
    frame = str(fmt.decode_frame_key(place_key(lazy := Store(lazy.path))))
    assert any(f.what == "places" and f.chunk == frame for f in found.findings)
    chunks = [f for f in found.findings if f.what == "chunk"]
    assert {f.image for f in chunks} >= {"derived"}
    assert all(f.offset is not None for f in chunks)
    assert checked(lazy, repair=True).intact
    assert_intact(lazy.path)
    with Store(lazy.path) as again:
        assert read_image(again, "derived") == IMAGES["derived"]


@pytest.mark.damaged
@pytest.mark.parametrize("check_first", [False, True])
def test_lost_place_is_healed_by_a_pull(lazy: Store, check_first: bool) -> None:
    remote = lazy.env.open_remote()
    hurt_places(lazy, place_key(lazy), (200, 333, 471))
    with lazy.env.write() as txn:
        txn.delete(place_key(lazy, 2), db=remote.places)
    if check_first:
        assert not checked(lazy).intact
        lazy = Store(lazy.path)
    assert not checked(lazy, repair=True).intact
    with Store(lazy.path) as again:
        with pytest.raises(DedupError):
            read_image(again, "derived")
        pull(again, "derived")
        assert read_image(again, "derived") == IMAGES["derived"]
        assert read_image(again, "base") == IMAGES["base"]  # shares what was lost
    assert_intact(lazy.path)


@pytest.mark.damaged
def test_lost_place_is_healed_by_an_import(lazy: Store, tmp_path: Path) -> None:
    hurt_places(lazy, place_key(lazy), (200, 333, 471))
    assert not checked(lazy).intact
    with Store(lazy.path) as again:
        import_bytes(again, tmp_path, "own", IMAGES["derived"])
        assert read_image(again, "base") == IMAGES["base"]
        again.collect_garbage()
    assert_intact(lazy.path)


@pytest.mark.damaged
@pytest.mark.parametrize("how", ["payload", "table", "distant", "whole"])
@pytest.mark.parametrize("check_first", [False, True])
def test_damaged_frame_with_a_place_is_fetched_again(
    lazy: Store, how: str, check_first: bool
) -> None:
    if how != "distant":
        read_image(lazy, "derived")
        lazy.fetcher().keeper.flush()
    with lazy.env.write() as txn:
        for key in [bytes(key) for key, _ in txn.cursor(db=lazy.env.frames)][:5]:
            record = bytearray(txn.get(key, db=lazy.env.frames))
            if how == "whole":
                record = bytearray(noise(1, len(record)))
            else:
                for at in (30, 31) if how in ("table", "distant") else (-9, -8, -200):
                    record[at] ^= 0x55
            txn.put(key, bytes(record), db=lazy.env.frames)
    if check_first:
        assert not checked(lazy).intact
        lazy = Store(lazy.path)
    assert checked(lazy, repair=True).intact
    assert_intact(lazy.path)
    with Store(lazy.path) as again:
        for name, data in IMAGES.items():
            assert read_image(again, name) == data
        again.collect_garbage()
    assert_intact(lazy.path)


@pytest.mark.damaged
def test_damaged_frame_whose_remote_is_away_is_what_a_from_source_mends(
    lazy: Store, far: Path, tmp_path: Path
) -> None:
    read_image(lazy, "derived")
    lazy.fetcher().keeper.flush()
    flip_record(lazy, "frames", keys_of(lazy, "frames")[0], -77)
    far.rename(tmp_path / "away")
    lazy.close()
    assert check_store(lazy.path, repair=True, sources=(tmp_path / "origin",)).intact
    assert_intact(lazy.path)
    with Store(lazy.path) as again:
        assert read_image(again, "derived") == IMAGES["derived"]


@pytest.mark.damaged
def test_damaged_frame_whose_remote_cannot_be_asked_comes_back_with_it(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_image(lazy, "derived")
    lazy.fetcher().keeper.flush()
    with lazy.env.write() as txn:
        key = fmt.frame_key(1)
        record = bytearray(txn.get(key, db=lazy.env.frames))
        for at in range(16 + 36 * record[10], len(record), 512):
            record[at] ^= 1
        txn.put(key, bytes(record), db=lazy.env.frames)
    with asked(monkeypatch) as remote:
        remote.before.append(lambda: fail(errno.EACCES))
        assert checked(lazy, repair=True).intact
    with Store(lazy.path) as again:
        assert distant_frames(again) == [1]
        assert read_image(again, "derived") == IMAGES["derived"]
    assert_intact(lazy.path)


@pytest.mark.damaged
def test_lying_remote_mends_nothing(lazy: Store, far: Path) -> None:
    read_image(lazy, "derived")
    lazy.fetcher().keeper.flush()
    flip_record(lazy, "frames", keys_of(lazy, "frames")[0], -77)
    for pack in pack_files(far):
        data = bytearray(pack.read_bytes())
        for at in range(0, len(data), 1000):
            data[at] ^= 1
        pack.write_bytes(data)
    assert not checked(lazy, repair=True).intact
    with Store(lazy.path) as again, pytest.raises(DedupError):
        read_image(again, "derived")


@pytest.mark.damaged
@pytest.mark.parametrize("wound", ["flip", "delete", "lead elsewhere"])
def test_index_of_distant_chunks_is_rebuilt(lazy: Store, wound: str) -> None:
    remote = lazy.env.open_remote()
    with lazy.env.write() as txn:
        before = [(bytes(k), bytes(v)) for k, v in txn.cursor(db=remote.distant)]
        digest, value = before[3]
        if wound == "flip":
            txn.put(digest, bytes([value[0] ^ 4]) + value[1:], db=remote.distant)
        elif wound == "delete":
            txn.delete(digest, db=remote.distant)
        else:
            txn.put(digest, fmt.encode_index(digest, fmt.make_ref(3, 90)), db=remote.distant)
    assert {f.what for f in checked(lazy).findings} == {"index"}
    assert check_store(lazy.path, repair=True).intact
    with Store(lazy.path) as again, again.env.read() as txn:
        found = [(bytes(k), bytes(v)) for k, v in txn.cursor(db=again.env.open_remote().distant)]
        assert found == before


@pytest.mark.damaged
def test_place_of_a_frame_that_is_not_there_is_found_and_deleted(lazy: Store) -> None:
    remote = lazy.env.open_remote()
    with lazy.env.write() as txn:
        value = bytes(txn.get(place_key(lazy), db=remote.places))
        txn.put(fmt.frame_key(99_999), value, db=remote.places)
    assert [f.what for f in checked(lazy).findings] == ["places"]
    assert check_store(lazy.path, repair=True).intact
    assert_intact(lazy.path)


@pytest.mark.damaged
def test_frames_in_a_remote_that_is_not_known_are_a_finding_that_says_what_to_do(
    lazy: Store, far: Path
) -> None:
    with lazy.env.write() as txn:
        txn.delete(fmt.remote_key("far"), db=lazy.env.meta)
    (finding,) = checked(lazy).findings
    assert finding.what == "remotes"
    assert "remote add" in finding.reason
    assert not check_store(lazy.path, repair=True).intact
    with Store(lazy.path) as again:
        add_remote(again.env, "far", [str(far)])
        assert read_image(again, "derived") == IMAGES["derived"]
    assert_intact(lazy.path)


@pytest.mark.damaged
def test_store_with_damaged_pages_keeps_places_remotes_and_what_is_distant(
    lazy: Store, tmp_path: Path
) -> None:
    with opened(lazy, "derived") as reader:
        read_range(reader, 0, 300_000)
    lazy.fetcher().keeper.flush()
    stats = lazy.stats()
    lazy.close()
    file = lazy.path / DATA_FILE
    whole = file.read_bytes()
    damaged = 0
    for page in range(2, len(whole) // 4096):
        # A page that a tree needs, whichever; others are free, or hold a frame.
        at = page * 4096
        file.write_bytes(whole[:at] + bytes(16) + whole[at + 16 :])
        damaged = len(verify_pages(file).findings)
        if damaged:
            break
    assert damaged
    assert check_store(lazy.path, repair=True).intact
    with Store(lazy.path) as again:
        assert again.superblock.features_incompat & fmt.FEATURE_INCOMPAT_REMOTE
        now = again.stats()
        assert (now.distant_frames, now.distant_bytes) == (
            stats.distant_frames,
            stats.distant_bytes,
        )
        assert sorted(again.names())[:2] == ["base", "derived"]
        for name, expected in IMAGES.items():
            assert read_image(again, name) == expected
    assert_intact(lazy.path)


# --- old stores and old releases ---


def test_store_of_before_gets_databases_and_flag_with_the_first_place(
    store: Store, far: Path, tmp_path: Path
) -> None:
    import_bytes(store, tmp_path, "own", noise(77, 200_000))
    assert store.env.remote is None
    assert not store.superblock.features_incompat
    add_remote(store.env, "far", [str(far)])
    assert store.env.remote is None  # a store that knows a remote is still one of before
    push(store, "own")
    store.close()
    with Store(store.path) as again:
        assert again.env.remote is not None
        assert again.superblock.features_incompat == fmt.FEATURE_INCOMPAT_REMOTE


def test_release_that_does_not_know_the_flag_refuses(
    lazy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy.close()
    monkeypatch.setattr("dedupstore.format.superblock.FEATURES_INCOMPAT_KNOWN", 0)
    with pytest.raises(StoreVersionError):
        Store(lazy.path)


def test_lazy_image_exports_and_differs_like_any_other(lazy: Store, tmp_path: Path) -> None:
    difference = lazy.diff("base", "derived")
    assert difference.only_b_bytes >= 290_000
    assert difference.shared_bytes > 1_000_000
    target = tmp_path / "out.img"
    export_image(lazy, "derived", target, silent)
    assert target.read_bytes() == IMAGES["derived"]


def test_import_beside_a_lazy_image_stores_what_it_has_at_hand(
    lazy: Store, far: Path, tmp_path: Path
) -> None:
    import_bytes(lazy, tmp_path, "own", IMAGES["base"])
    shutil.rmtree(far)
    assert read_image(lazy, "own") == IMAGES["base"]
