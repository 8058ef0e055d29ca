"""Pushing with a trace: what it names lies together in the remote, in its order, before the rest;
whoever then starts from the image asks for little, without a trace of his own."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.check import check_store
from dedupstore.remote.configuration import add_remote, find_remote
from dedupstore.remote.fetching import Fetcher
from dedupstore.remote.grouping import Wanted
from dedupstore.remote.manifests import frames_of
from dedupstore.remote.streams import Stream
from dedupstore.store import Store
from dedupstore.traces import Trace, make_trace
from tests.conftest import import_bytes, noise, opened, read_image, read_range
from tests.lazy import asked, pull
from tests.remotes import assert_whole, push

# Some 80 frames; what is used of it is a chunk here and one there, in no order.
IMAGE = noise(21, 20 << 20)
NEXT = IMAGE[: 15 << 20] + noise(22, 3 << 20)
USED = random.Random(5).sample(range(0, len(IMAGE) - 4096, 4096), 25)


def chunk_at(store: Store, name: str, offset: int) -> tuple[bytes, int]:
    """Digest and length of the chunk of an image that holds the byte at `offset`."""
    manifest = store.open_manifest(name)
    ((start, _, ref),) = manifest.runs(offset, 1)
    frame, slot = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
    with store.env.read() as txn:
        slots = fmt.decode_frame_header(txn.get(fmt.frame_key(frame), db=store.env.frames), frame)
    while start + slots.slots[slot].length <= offset:
        start += slots.slots[slot].length
        slot += 1
    store.close_manifest(manifest)
    return slots.slots[slot].digest, slots.slots[slot].length


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with two versions of an image, and two remotes: `plain`, `traced`."""
    directory = tmp_path_factory.mktemp("origin")
    with Store.create(directory / "store") as store:
        for name, data in (("a", IMAGE), ("b", NEXT)):
            import_bytes(store, directory, name, data)
        for name in ("plain", "traced"):
            add_remote(store.env, name, [str(directory / name)])
            push(store, name, "a", trace=trace_of(store) if name == "traced" else None)
        yield store


def trace_of(store: Store) -> Trace:
    return make_trace(bytes(32), [chunk_at(store, "a", offset) for offset in USED])


def folder(origin: Store, name: str) -> Path:
    return origin.path.parent / name


def test_what_the_trace_names_comes_first_in_its_order(origin: Store) -> None:
    trace = trace_of(origin)
    remote, _ = find_remote(origin.env, "traced")
    manifest = remote.manifest(remote.root("a"))
    frames = list(frames_of(manifest, remote.indexes(manifest)))
    digests = [slot.digest for _, frame in frames for slot in frame.header.slots]
    assert digests[: len(trace.digests)] == list(trace.digests)
    assert len(digests) == len(set(digests))
    # In a pack of their own, one behind the other: who reads it in order gets nothing else.
    (first, _), *_ = frames
    of_first = [frame for pack, frame in frames if pack == first]
    assert [slot.digest for frame in of_first for slot in frame.header.slots] == list(trace.digests)
    assert [frame.offset for frame in of_first] == sorted(frame.offset for frame in of_first)
    assert assert_whole(remote) == ["a"]


@pytest.mark.parametrize(("remote", "requests"), [("plain", (12, 25)), ("traced", (1, 4))])
def test_a_start_asks_for_little_of_an_image_that_was_laid_out_for_it(
    origin: Store,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    remote: str,
    requests: tuple[int, int],
) -> None:
    add_remote(store.env, "far", [str(folder(origin, remote))])
    pull(store, "a")
    with opened(store, "a") as reader, asked(monkeypatch) as found:
        for offset in USED:
            assert read_range(reader, offset, 4096) == IMAGE[offset : offset + 4096]
    fewest, most = requests
    assert fewest <= len(found.packs()) <= most
    if remote == "traced":
        assert found.bytes() <= 1.1 * sum(trace_of(origin).lengths)
    assert read_image(store, "a") == IMAGE
    store.close()
    assert check_store(store.path).findings == ()


def test_the_next_version_sends_only_what_is_new_and_lists_the_same_first(origin: Store) -> None:
    trace = trace_of(origin)
    pushed = push(origin, "traced", "b", trace=trace)
    assert pushed.new_bytes <= (3 << 20) + (256 << 10)
    remote, _ = find_remote(origin.env, "traced")
    manifest = remote.manifest(remote.root("b"))
    frames = list(frames_of(manifest, remote.indexes(manifest)))
    (_, first), *_ = frames
    assert {slot.digest for slot in first.header.slots} <= set(trace.digests)
    assert assert_whole(remote) == ["a", "b"]


def test_a_trace_of_another_image_changes_nothing(origin: Store, tmp_path: Path) -> None:
    add_remote(origin.env, "other", [str(tmp_path / "other")])
    strange = make_trace(bytes(32), [(bytes([n]) * 32, 4096) for n in range(1, 9)])
    pushed = push(origin, "other", "a", trace=strange)
    assert pushed.new_bytes == len(IMAGE)
    remote, _ = find_remote(origin.env, "other")
    assert assert_whole(remote) == ["a"]


def test_reading_in_order_goes_on_from_pack_to_pack_in_long_requests(
    origin: Store, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_remote(store.env, "far", [str(folder(origin, "plain"))])
    pull(store, "a")
    with opened(store, "a") as reader, asked(monkeypatch) as found:
        for offset in range(0, len(IMAGE), 1 << 17):
            assert read_range(reader, offset, 1 << 17) == IMAGE[offset : offset + (1 << 17)]
    packs = {path: 0 for path, _, _ in found.packs()}
    assert len(packs) >= 3
    for path, _, _ in found.packs():
        packs[path] += 1
    # The first pack takes some short ones, until it is clear that it is read in order.
    _, *others = packs.values()
    assert max(others) <= 8
    assert sum(length for _, _, length in found.packs()) <= 1.01 * len(IMAGE)


def test_a_read_of_many_frames_asks_for_all_of_them_at_once_and_for_no_more(
    origin: Store, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_remote(store.env, "far", [str(folder(origin, "plain"))])
    pull(store, "a")
    expect = store.loader().expect
    with opened(store, "a") as reader, asked(monkeypatch) as found:
        reader._expect = expect
        assert read_range(reader, 1 << 20, 2 << 20) == IMAGE[1 << 20 : 3 << 20]
        assert len(found.packs()) == 1
        assert found.bytes() <= (2 << 20) + 2 * (256 << 10)


def test_who_reads_in_order_is_always_ahead_of_what_he_waits_for(
    origin: Store, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is clear that he will go on, no request begins because he waits for it."""
    add_remote(store.env, "far", [str(folder(origin, "plain"))])
    pull(store, "a")
    waited: list[int] = []
    gather = Fetcher._gather

    def noted(self: Fetcher, first: Wanted) -> tuple[Stream, list[Wanted]]:
        if sys._getframe(1).f_code.co_name == "_lead":
            waited.append(first.frame)
        return gather(self, first)

    monkeypatch.setattr(Fetcher, "_gather", noted)
    with opened(store, "a") as reader, asked(monkeypatch) as found:
        found.before.append(lambda: time.sleep(0.02))
        for offset in range(0, len(IMAGE), 1 << 17):
            if offset == 9 << 20:
                waited.clear()
            assert read_range(reader, offset, 1 << 17) == IMAGE[offset : offset + (1 << 17)]
    assert len(waited) <= 1  # on a busy machine he may get there first


def test_who_reads_here_and_there_is_brought_little_that_he_does_not_read(
    origin: Store, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that start read files of a megabyte or two, one here and one there."""
    add_remote(store.env, "far", [str(folder(origin, "plain"))])
    pull(store, "a")
    read = 0
    with opened(store, "a") as reader, asked(monkeypatch) as found:
        for begin in (15 << 20, 3 << 20, 9 << 20):
            for offset in range(begin, begin + (5 << 19), 1 << 17):
                assert read_range(reader, offset, 1 << 17) == IMAGE[offset : offset + (1 << 17)]
                read += 1 << 17
    assert found.bytes() <= 1.5 * read
