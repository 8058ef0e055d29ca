"""Recording traces: every reader is seen, first uses are kept in order, and off costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import ImageNotFoundError, RecordingError
from dedupstore.frames import read_head
from dedupstore.imported import Imported
from dedupstore.store import Store
from nbdplugin import recordings
from nbdplugin.session import Config, Session
from tests.conftest import blocks, in_threads, noise, read_range

Add = Callable[[str, bytes], Imported]

IMAGE = noise(1, 400_000) + bytes(40_000) + noise(2, 300_000) + noise(3, 5000)


@pytest.fixture
def session(store: Store, add: Add) -> Iterator[Session]:
    """A server without nbdkit, of a store with `a`, its clone `b` and another image `c`."""
    add("a", IMAGE)
    store.clone("a", "b")
    add("c", blocks(7, 8, 9))
    path = store.path
    store.close()
    running = Session(Config(path))
    yield running
    running.close()
    store.__init__(path)  # type: ignore[misc] - for the fixture's scrub


def chunks_of(session: Session, name: str) -> list[tuple[int, bytes, int]]:
    """(offset, digest, length) of each chunk of an image, in its order; holes left out."""
    store = session.store
    manifest = store.open_manifest(name)
    found = []
    with store.env.read() as txn:
        for start, length, ref in manifest.runs(0, manifest.size):
            if not ref:
                continue
            frame, slot = ref >> fmt.REF_SLOT_BITS, ref & fmt.REF_SLOT_MASK
            head = read_head(txn, store.env, frame)
            assert head is not None
            at = start
            for one in fmt.decode_frame_header(head[0], frame).slots[slot:]:
                if at == start + length:
                    break
                found.append((at, one.digest, one.length))
                at += one.length
    store.close_manifest(manifest)
    return found


def digest_of(session: Session, name: str) -> bytes:
    return bytes.fromhex(session.store.image(name).digest)


def test_chunks_are_noted_in_the_order_of_their_first_use(session: Session) -> None:
    chunks = chunks_of(session, "a")
    image = digest_of(session, "a")
    assert len({digest for _, digest, _ in chunks}) == len(chunks) > 20
    reader = session.open("a")
    session.recordings.begin(image)
    order = [9, 3, 3, 20, 9, 0]
    for at in order:
        offset, digest, length = chunks[at]
        data = read_range(reader, offset + length - 1, 1)
        assert blake3(IMAGE[offset : offset + length]).digest() == digest
        assert data == IMAGE[offset + length - 1 : offset + length]
    trace = session.recordings.trace(image)
    assert trace.image == image
    assert trace.digests == tuple(chunks[at][1] for at in (9, 3, 20, 0))
    assert list(trace.lengths) == [chunks[at][2] for at in (9, 3, 20, 0)]
    session.close_export(reader)


def test_one_read_uses_every_chunk_that_it_touches_and_no_other(session: Session) -> None:
    chunks = chunks_of(session, "a")
    image = digest_of(session, "a")
    reader = session.open("a")
    session.recordings.begin(image)
    begin, end = chunks[4][0] + 1, chunks[8][0] + 1
    read_range(reader, begin, end - begin)
    assert session.recordings.trace(image).digests == tuple(c[1] for c in chunks[4:9])
    read_range(reader, 0, len(IMAGE))  # across the hole
    assert set(session.recordings.trace(image).digests) == {c[1] for c in chunks}
    session.close_export(reader)


def test_every_reader_of_the_image_is_seen_whenever_it_came(session: Session) -> None:
    chunks = chunks_of(session, "a")
    image = digest_of(session, "a")
    early = [session.open("a"), session.open("b")]
    read_range(early[0], 0, len(IMAGE))  # all is in the cache from now on
    session.recordings.begin(image)
    late = [session.open("b"), session.open(f"/{image.hex()}")]
    readers = [*early, *late]
    for at, reader in enumerate(readers):
        read_range(reader, chunks[5 * at][0], 1)
    noted = session.recordings.trace(image).digests
    assert noted == tuple(chunks[5 * at][1] for at in range(4))
    for reader in readers:
        session.close_export(reader)


def test_reads_of_other_images_are_not_noted(session: Session) -> None:
    image = digest_of(session, "a")
    other = session.open("c")
    session.recordings.begin(image)
    before = other.read
    read_range(other, 0, 4096)
    assert session.recordings.trace(image).digests == ()
    assert other.read is before
    session.close_export(other)


def test_a_reader_that_nobody_records_runs_the_same_code_as_ever(session: Session) -> None:
    image = digest_of(session, "a")
    reader = session.open("a")
    plain = reader.read
    session.recordings.begin(digest_of(session, "c"))
    assert reader.read is plain
    session.recordings.begin(image)
    assert reader.read.__code__ is not plain.__code__
    session.recordings.end(image)
    assert reader.read.__code__ is plain.__code__
    late = session.open("a")
    assert late.read.__code__ is plain.__code__
    for each in (reader, late):
        session.close_export(each)


def test_readers_in_many_threads_note_each_chunk_once(session: Session) -> None:
    image = digest_of(session, "a")
    session.recordings.begin(image)

    def read(_: int) -> None:
        reader = session.open("a")
        for offset in range(0, len(IMAGE) - 1000, 1000):
            read_range(reader, offset, 1000)
        session.close_export(reader)

    in_threads(4, read)
    trace = session.recordings.trace(image)
    assert len(set(trace.digests)) == len(trace.digests)
    assert trace.bytes == sum(length for _, _, length in chunks_of(session, "a"))


def test_an_image_is_recorded_by_one_at_a_time(session: Session) -> None:
    image = digest_of(session, "a")
    session.recordings.begin(image)
    with pytest.raises(RecordingError, match="recorded already"):
        session.recordings.begin(image)
    session.recordings.end(image)
    for ask in (session.recordings.trace, session.recordings.end, session.recordings.chunks):
        with pytest.raises(ImageNotFoundError):
            ask(image)
    session.recordings.begin(image)


def test_a_recording_whose_recorder_has_gone_ends_with_the_next_read(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = digest_of(session, "a")
    reader = session.open("a")
    plain = reader.read.__code__
    session.recordings.begin(image)
    monkeypatch.setattr(recordings, "ABANDONED_SECONDS", -1.0)
    read_range(reader, 0, 4096)
    assert reader.read.__code__ is plain
    with pytest.raises(ImageNotFoundError):
        session.recordings.chunks(image)
    session.close_export(reader)


def test_a_recording_holds_no_more_chunks_than_a_trace_may(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dedupstore.recording.TRACE_CHUNKS_MAX", 3)
    image = digest_of(session, "a")
    reader = session.open("a")
    session.recordings.begin(image)
    assert read_range(reader, 0, len(IMAGE)) == IMAGE
    assert session.recordings.chunks(image) == 3
    session.close_export(reader)
