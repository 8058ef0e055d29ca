"""Making room: only what a remote has and keeps goes, the coldest first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dedupstore import format as fmt, places
from dedupstore.errors import RemoteError
from dedupstore.places import find_places, list_places, put_places
from dedupstore.remote.collecting import collect_remote
from dedupstore.remote.configuration import add_remote, find_remote
from dedupstore.store import Store
from tests.conftest import import_bytes, noise, opened, read_image, read_range, silent
from tests.httpd import serving
from tests.lazy import IMAGES, distant_frames, make_remote, pack_files, pull, push


@pytest.fixture
def far(tmp_path: Path) -> Path:
    return make_remote(tmp_path)


@pytest.fixture
def full(store: Store, far: Path, tmp_path: Path) -> Store:
    """A store with an image that the remote has, and one that it has not."""
    add_remote(store.env, "far", [str(far)])
    pull(store, "derived", lazy=False)
    import_bytes(store, tmp_path, "own", noise(50, 1_000_000))
    return store


def present_frames(store: Store) -> set[int]:
    with store.env.read() as txn:
        frames = {fmt.decode_frame_key(key) for key, _ in txn.cursor(db=store.env.frames)}
    return frames - set(distant_frames(store))


def test_evict_drops_what_the_remote_has_and_never_what_it_has_not(full: Store) -> None:
    done = full.evict(0, silent)
    assert done.frames >= 10
    assert done.freed_bytes > 1_500_000
    assert full.stats().unique_bytes >= 1_000_000
    assert full.missing_bytes("own") == 0
    assert full.missing_bytes("derived") > 2_000_000
    assert read_image(full, "own") == noise(50, 1_000_000)
    assert read_image(full, "derived") == IMAGES["derived"]


def test_evict_stops_at_its_limit_and_drops_no_more_than_needed(full: Store) -> None:
    before = full.env.file_bytes()
    assert full.evict(before, silent).frames == 0
    limit = before - 600_000
    done = full.evict(limit, silent)
    assert done.file_bytes == full.env.file_bytes() <= limit
    assert done.freed_bytes < 600_000 + 2 * (256 << 10)


def test_coldest_go_first(full: Store) -> None:
    remote = full.env.open_remote()
    with full.env.write() as txn:
        placed = [(f, where) for f, where in list_places(txn, remote)]
        for at, (frame, where) in enumerate(placed):
            assert isinstance(where, places.PlaceRecord)
            age = 1 if at % 2 else 500
            put_places(txn, remote, frame, replace(where, used=where.used - age))
    cold = {frame for at, (frame, _) in enumerate(placed) if not at % 2}
    full.evict(full.env.file_bytes() - 500_000, silent)
    dropped = set(distant_frames(full))
    assert dropped
    assert dropped <= cold


def test_what_was_read_lately_counts_as_used(full: Store) -> None:
    remote = full.env.open_remote()
    with full.env.write() as txn:
        for frame, where in list(list_places(txn, remote)):
            assert isinstance(where, places.PlaceRecord)
            put_places(txn, remote, frame, replace(where, used=100))
    with opened(full, "derived") as reader:
        read_range(reader, 0, 4096)
    full.close()  # notes what was used
    with Store(full.path) as again:
        with again.env.read() as txn:
            uses = {frame: where.used for frame, where in list_places(txn, again.env.open_remote())}  # type: ignore[union-attr]
        assert sorted(set(uses.values()))[0] == 100
        assert len([used for used in uses.values() if used > 100]) == 1


def test_packs_that_are_gone_or_condemned_are_not_counted_on(full: Store, far: Path) -> None:
    condemned = far / "images"
    for document in condemned.iterdir():
        document.unlink()
    remote, _ = find_remote(full.env, "far")
    collect_remote(remote, grace_seconds=0, dry_run=False, force=True, on_progress=silent)
    assert full.evict(0, silent).frames == 0
    assert read_image(full, "derived") == IMAGES["derived"]


def test_deleted_packs_are_not_counted_on(full: Store, far: Path) -> None:
    gone = pack_files(far)[0]
    gone.unlink()
    full.evict(0, silent)
    with full.env.read() as txn:
        for frame in distant_frames(full):
            where = find_places(txn, full.env.open_remote(), frame)
            assert where is not None
            assert all(place.pack.hex() != gone.name for place in where.places)
    assert read_image(full, "derived") == IMAGES["derived"]


def test_remote_that_cannot_be_asked_is_told_and_nothing_goes(
    full: Store, far: Path, tmp_path: Path
) -> None:
    (far / "condemned").mkdir(exist_ok=True)
    far.rename(tmp_path / "away")
    far.write_bytes(b"no directory")
    before = present_frames(full)
    try:
        with pytest.raises(RemoteError):
            full.evict(0, silent)
    finally:
        far.unlink()
    assert present_frames(full) == before


def test_evict_counts_on_a_remote_that_only_http_leads_to(
    store: Store, far: Path, tmp_path: Path
) -> None:
    with serving(far) as url:
        add_remote(store.env, "far", [url])
        pull(store, "derived", lazy=False)
        assert store.evict(0, silent).frames >= 10
        assert read_image(store, "derived") == IMAGES["derived"]
        store.fetcher().keeper.flush()


def test_what_was_pushed_as_it_is_may_go_and_the_store_says_so(
    store: Store, far: Path, tmp_path: Path
) -> None:
    add_remote(store.env, "far", [str(far)])
    data = noise(60, 2_000_000)
    import_bytes(store, tmp_path, "mine", data)
    push(store, "mine")
    assert store.evict(0, silent).frames > 0
    assert read_image(store, "mine") == data
    store.close()
    with Store(store.path) as again:
        assert again.superblock.features_incompat == fmt.FEATURE_INCOMPAT_REMOTE


def test_servers_go_on_while_frames_are_dropped(full: Store) -> None:
    data = IMAGES["derived"]
    with opened(full, "derived", budget=1 << 20) as reader:
        for _ in range(4):
            assert read_range(reader, 0, len(data)) == data
            full.evict(0, silent)
            full.fetcher().keeper.flush()
