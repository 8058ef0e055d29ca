"""Place records: where else frames are, and which remotes are needed for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.errors import StoreDamagedError
from dedupstore.places import (
    Place,
    PlaceRecord,
    add_places,
    decode_places,
    encode_places,
    find_places,
    list_places,
    needs_remote,
)
from dedupstore.remote.configuration import add_remote
from dedupstore.store import Store
from tests.conftest import flipped, import_bytes, noise, read_image, silent
from tests.lazy import distant_frames, make_remote, pull, push

DATA = noise(70, 1_000_000)
PLACE = Place(1, b"p" * 32, 7, 99)


def recorded(store: Store) -> dict[int, PlaceRecord]:
    with store.env.read() as txn:
        return {
            frame: record
            for frame, record in list_places(txn, store.env.open_remote())
            if isinstance(record, PlaceRecord)
        }


def needed(store: Store, number: int) -> str | None:
    with store.env.read() as txn:
        return needs_remote(txn, store.env, number)


def frames(store: Store) -> list[int]:
    with store.env.read() as txn:
        return [fmt.decode_frame_key(key) for key, _ in txn.cursor(db=store.env.frames)]


def test_record_comes_back_and_any_flipped_bit_is_found() -> None:
    record = PlaceRecord((PLACE, Place(2, b"q" * 32, 1 << 40, 1)), 480_000)
    value = encode_places(record, 5)
    assert len(value) == 12 + 2 * 56
    assert decode_places(value, 5) == record
    for bit in range(8 * len(value)):
        with pytest.raises(StoreDamagedError, match="frame 5"):
            decode_places(flipped(value, bit), 5)
    for wrong in (b"", value[:11], value[:-1], value + b"\0"):
        with pytest.raises(StoreDamagedError):
            decode_places(wrong, 5)
    with pytest.raises(StoreDamagedError):  # of another frame
        decode_places(value, 6)


def test_places_are_added_to_frames_that_are_there_once_each_and_not_without_end(
    store: Store, tmp_path: Path
) -> None:
    import_bytes(store, tmp_path, "image", DATA)
    one, two, *_ = frames(store)
    gone = max(frames(store)) + 1
    add_places(store.env, {one: PLACE, gone: PLACE}, 100)
    add_places(store.env, {one: PLACE, two: PLACE}, 200)
    assert recorded(store) == {one: PlaceRecord((PLACE,), 100), two: PlaceRecord((PLACE,), 200)}
    for number in range(2, 20):
        add_places(store.env, {one: Place(number, b"q" * 32, 0, 1)}, 300)
    kept = recorded(store)[one]
    assert kept.used == 100
    assert [place.remote for place in kept.places] == list(range(1, 9))
    with store.env.write() as txn:  # no remote has them: nothing that `check` should find
        for frame in (one, two):
            txn.delete(fmt.frame_key(frame), db=store.env.open_remote().places)
        assert find_places(txn, store.env.open_remote(), one) is None


def test_remote_is_needed_as_long_as_bytes_are_only_there(store: Store, tmp_path: Path) -> None:
    assert needed(store, 1) is None
    far = make_remote(tmp_path, {"image": DATA})
    number = add_remote(store.env, "far", [str(far)]).number
    assert needed(store, number) is None
    pull(store, "image")
    count = len(distant_frames(store))
    assert needed(store, number) == (
        f"{count} frames whose bytes are only there ('dedupstore prefetch')"
    )
    assert needed(store, number + 1) is None
    assert read_image(store, "image") == DATA
    store.fetcher().keeper.flush()
    assert needed(store, number) is None


def test_what_was_pushed_may_be_evicted_and_comes_back_when_it_is_read(
    store: Store, tmp_path: Path
) -> None:
    number = add_remote(store.env, "far", [str(tmp_path / "far")]).number
    import_bytes(store, tmp_path, "image", DATA)
    import_bytes(store, tmp_path, "own", noise(71, 300_000))
    push(store, "image")
    pushed = recorded(store)
    assert {place.remote for record in pushed.values() for place in record.places} == {number}
    assert store.evict(0, silent).frames == len(pushed) == len(distant_frames(store))
    assert store.missing_bytes("image") == len(DATA)
    assert store.missing_bytes("own") == 0
    assert needed(store, number) is not None
    assert read_image(store, "image") == DATA
    store.fetcher().keeper.flush()
    assert distant_frames(store) == []
    assert recorded(store).keys() == pushed.keys()  # so that they may go again
