"""Reads of an open image, against its bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.cache import FrameCache
from dedupstore.constants import FRAME_BYTES_MAX
from dedupstore.errors import ChunkDamagedError
from dedupstore.imported import Imported
from dedupstore.reader import ImageReader, Prefetcher, ReadCounters
from dedupstore.store import Store
from tests.conftest import (
    CACHE_BYTES,
    GRID,
    SilentPrefetcher,
    blocks,
    flip_record,
    hammered,
    in_threads,
    keys_of,
    noise,
    opened,
    read_image,
    read_range,
    text,
)

Add = Callable[[str, bytes], Imported]

# Runs of every kind: data, holes, repeated chunks, more than one frame, a ragged end.
MIXED = (
    noise(1, 300_000 // GRID * GRID)
    + bytes(5 * GRID)
    + noise(2, 40 * GRID)
    + noise(1, 300_000 // GRID * GRID)
    + bytes(GRID)
    + text(3, 100 * GRID)
    + noise(4, 1000)
)


def frames_of(reader: ImageReader) -> list[int]:
    return list(dict.fromkeys(ref >> fmt.REF_SLOT_BITS for ref in reader.manifest.refs if ref))


def offset_of(reader: ImageReader, frame: int) -> int:
    refs = [ref >> fmt.REF_SLOT_BITS for ref in reader.manifest.refs]
    return reader.manifest.starts[refs.index(frame)]


@pytest.mark.parametrize("budget", [1, FRAME_BYTES_MAX * 2, CACHE_BYTES])
def test_reads_equal_the_image_whatever_the_budget(store: Store, add: Add, budget: int) -> None:
    add("mixed", MIXED)
    with opened(store, "mixed", budget) as reader:
        starts = reader.manifest.starts
        assert len(starts) > 6
        for start in starts[:-1]:
            for offset in (max(start - 1, 0), start, start + 1, start + 4095):
                for wanted in (1, 2, 4096, 70_000):
                    length = min(wanted, len(MIXED) - offset)
                    got = read_range(reader, offset, length)
                    assert got == MIXED[offset : offset + length]


def test_one_read_of_the_whole_image_crosses_everything(store: Store, add: Add) -> None:
    add("mixed", MIXED)
    with opened(store, "mixed") as reader:
        assert read_range(reader, 0, len(MIXED)) == MIXED
        assert read_range(reader, len(MIXED) - 1, 1) == MIXED[-1:]


def test_long_hole_reads_as_zeros(store: Store, add: Add) -> None:
    data = blocks(1) + bytes(3 << 20) + blocks(2)
    add("hole", data)
    with opened(store, "hole") as reader:
        assert read_range(reader, 0, len(data)) == data
        assert read_range(reader, 5000, 2 << 20) == bytes(2 << 20)


def test_clone_is_served_from_the_same_entries(store: Store, add: Add) -> None:
    add("base", MIXED)
    store.clone("base", "clone")
    loader = store.loader()
    cache = FrameCache(CACHE_BYTES, loader.load)
    counters = ReadCounters()
    for name in ("base", "clone"):
        manifest = store.open_manifest(name)
        reader = ImageReader(name, manifest, cache, SilentPrefetcher(), counters)  # type: ignore[arg-type]
        assert read_range(reader, 0, len(MIXED)) == MIXED
        store.close_manifest(manifest)
        if name == "base":
            loaded = loader.chunks_loaded
            assert loaded > 0
    assert loader.chunks_loaded == loaded


def test_read_ahead_reads_are_right_and_load_each_frame_once(store: Store, add: Add) -> None:
    data = noise(9, 4 << 20)
    add("long", data)
    loader = store.loader()
    cache = FrameCache(16 << 20, loader.load)
    prefetcher = Prefetcher(cache, ReadCounters())
    manifest = store.open_manifest("long")
    reader = ImageReader("long", manifest, cache, prefetcher, ReadCounters())
    got = b"".join(read_range(reader, at, 65536) for at in range(0, len(data), 65536))
    store.close_manifest(manifest)
    prefetcher.close()
    assert got == data
    assert loader.frames_loaded == store.stats().frames


def test_sequential_reads_ask_for_the_frames_that_follow(store: Store, add: Add) -> None:
    add("long", noise(9, 8 << 20))
    with opened(store, "long", 16 << 20) as reader:
        frames = frames_of(reader)
        asked = reader._prefetcher.asked  # type: ignore[attr-defined]
        read_range(reader, 0, GRID)
        assert asked[:2] == frames[1:3]
        assert len(asked) < len(frames) // 2
        for frame in frames[1:]:
            read_range(reader, offset_of(reader, frame), GRID)
        assert asked == frames[1:]  # each once, in order


def test_random_reads_ask_for_nothing(store: Store, add: Add) -> None:
    data = noise(9, 40 << 18)  # of 40 frames
    add("long", data)
    with opened(store, "long", 32 << 20) as reader:
        frames = frames_of(reader)
        asked = reader._prefetcher.asked  # type: ignore[attr-defined]
        for i in (30, 3, 25, 2, 38, 10, 35):
            read_range(reader, offset_of(reader, frames[i]), GRID)
        assert asked == []


def test_read_ahead_skips_what_is_cached_and_holes(store: Store, add: Add) -> None:
    add("long", noise(9, 1 << 20) + bytes(1 << 20) + noise(8, 1 << 20))
    with opened(store, "long", 16 << 20) as reader:
        frames = frames_of(reader)
        reader.load(0, 1 << 20)
        asked = reader._prefetcher.asked  # type: ignore[attr-defined]
        for frame in frames:
            read_range(reader, offset_of(reader, frame), GRID)
        assert 0 not in asked
        assert not set(asked) & set(frames[:4])


def test_full_backlog_drops_requests_and_reads_go_on(store: Store, add: Add) -> None:
    data = noise(9, 2 << 20)
    add("long", data)
    with opened(store, "long") as reader:
        reader._prefetcher.request = lambda _: False  # type: ignore[method-assign]
        got = b"".join(read_range(reader, at, 65536) for at in range(0, len(data), 65536))
    assert got == data


def test_load_brings_a_range_into_the_cache(store: Store, add: Add) -> None:
    add("mixed", MIXED)
    with opened(store, "mixed") as reader:
        reader.load(0, len(MIXED))
        misses = reader._cache.misses
        assert misses == store.stats().frames
        read_range(reader, 0, len(MIXED))
        assert reader._cache.misses == misses


def test_counters_are_exact_under_threads(store: Store, add: Add) -> None:
    add("mixed", MIXED)
    rounds, length = 3000, 512
    with opened(store, "mixed") as reader:
        counters = reader._counters
        reader.load(0, len(MIXED))
        offset = 300_000 // GRID * GRID + 6 * GRID  # inside data

        def work(_: int) -> None:
            buffer = memoryview(bytearray(length))
            for _ in range(rounds):
                reader.read(buffer, offset)

        hammered(lambda: in_threads(4, work))
        assert counters.bytes == 4 * rounds * length
        assert counters.hits == 4 * rounds
        assert counters.errors == 0


def test_threads_read_one_image_through_a_tiny_cache(store: Store, add: Add) -> None:
    add("mixed", MIXED)
    with opened(store, "mixed", FRAME_BYTES_MAX * 2, readahead=True) as reader:

        def work(seed: int) -> None:
            for i in range(100):
                offset = (i * 7919 * GRID + seed * 12345) % (len(MIXED) - 20_000)
                assert read_range(reader, offset, 20_000) == MIXED[offset : offset + 20_000]

        in_threads(4, work)


@pytest.mark.damaged
def test_damage_fails_its_own_reads_and_names_image_offset_and_chunk(
    store: Store, add: Add
) -> None:
    data = noise(9, 2 << 20)
    add("hurt", data)
    with opened(store, "hurt") as reader:
        frames = frames_of(reader)
        bad = frames[3]
        start, end = offset_of(reader, bad), offset_of(reader, frames[4])
        flip_record(store, "frames", fmt.frame_key(bad), -1)
        with pytest.raises(ChunkDamagedError) as caught:
            read_range(reader, start + 5000, GRID)
        assert (caught.value.image, caught.value.offset) == ("hurt", start + 5000)
        assert caught.value.frame == bad
        assert "'hurt'" in str(caught.value)
        assert str(start + 5000) in str(caught.value)
        assert str(bad) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert reader._counters.errors == 1
        for at in (*range(0, start, GRID), *range(end, len(data), GRID)):
            assert read_range(reader, at, GRID) == data[at : at + GRID]


@pytest.mark.damaged
def test_read_that_runs_into_damage_names_where_the_damage_begins(store: Store, add: Add) -> None:
    add("hurt", noise(9, 2 << 20))
    with opened(store, "hurt") as reader:
        bad = frames_of(reader)[1]
        start = offset_of(reader, bad)
        flip_record(store, "frames", fmt.frame_key(bad), 400)
        with pytest.raises(ChunkDamagedError) as caught:
            read_range(reader, start - GRID, 2 * GRID)
        assert caught.value.offset == start
        with pytest.raises(ChunkDamagedError) as caught:
            reader.load(0, 2 << 20)
        assert caught.value.offset == start


@pytest.mark.damaged
def test_missing_frame_is_reported_like_damage(store: Store, add: Add) -> None:
    add("hurt", noise(9, 1 << 20))
    with opened(store, "hurt") as reader:
        bad = frames_of(reader)[2]
        with store.env.write() as txn:
            txn.delete(fmt.frame_key(bad), db=store.env.frames)
        with pytest.raises(ChunkDamagedError, match="missing"):
            read_range(reader, offset_of(reader, bad), 1)


@pytest.mark.damaged
@pytest.mark.parametrize("slots", [0, 1])
def test_chunks_that_their_frame_does_not_hold_raise(store: Store, add: Add, slots: int) -> None:
    """A repair keeps of a frame what the index still knows, which may be nothing."""
    add("hurt", noise(9, 1 << 20))
    with opened(store, "hurt") as reader:
        frame = frames_of(reader)[0]
        record = store.loader()._codecs.encode([fmt.DROPPED] * slots, b"")
        fmt.seal_frame(record, frame)
        with store.env.write() as txn:
            txn.put(fmt.frame_key(frame), bytes(record), db=store.env.frames)
        reader.manifest.refs[0] += 5  # of the frame's later chunks
        with pytest.raises(ChunkDamagedError) as caught:
            read_range(reader, 0, GRID)
        assert (caught.value.image, caught.value.slot) == ("hurt", 5)


@pytest.mark.damaged
def test_damage_is_not_cached(store: Store, add: Add) -> None:
    data = noise(9, 100_000)
    add("hurt", data)
    (key,) = keys_of(store, "frames")
    flip_record(store, "frames", key, -1)
    with opened(store, "hurt") as reader:
        with pytest.raises(ChunkDamagedError):
            read_range(reader, 0, GRID)
        flip_record(store, "frames", key, -1)
        assert read_range(reader, 0, GRID) == data[:GRID]


def test_open_images_of_one_digest_share_their_manifest(store: Store, add: Add) -> None:
    add("base", MIXED)
    store.clone("base", "clone")
    first, second = store.open_manifest("base"), store.open_manifest("clone")
    assert first is second
    store.close_manifest(first)
    store.close_manifest(second)


def test_whole_image_through_the_helper_equals_its_bytes(
    store: Store, add: Add, tmp_path: Path
) -> None:
    add("mixed", MIXED)
    assert read_image(store, "mixed") == MIXED


def test_empty_reads_read_nothing(store: Store, add: Callable[[str, bytes], object]) -> None:
    add("empty", b"")
    add("full", noise(1, 8192))
    with opened(store, "empty") as reader:
        reader.read(memoryview(bytearray()), 0)
    with opened(store, "full") as reader:
        for offset in (0, 5000, 8192):
            reader.read(memoryview(bytearray()), offset)
