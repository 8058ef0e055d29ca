"""Telling readers in order from others: what a request may bring grows only for the former."""

from __future__ import annotations

import pytest

from dedupstore.places import Place
from dedupstore.remote.streams import REQUEST_BYTES_MAX, REQUEST_BYTES_MIN, Stream, Streams

FRAME = 100_000
MIB = 1 << 20


def at(offset: int, pack: bytes = b"p") -> Place:
    return Place(1, pack * 32, offset, FRAME)


def read_in_order(
    streams: Streams, pack: bytes = b"p", until: int = 3 * MIB, frame: int = 1
) -> tuple[Stream, int]:
    """Requests one behind the other, each as long as it may be; the stream, and the frame that
    would be next."""
    offset = 0
    while True:
        stream = streams.begin(frame, at(offset, pack), REQUEST_BYTES_MAX)
        brought = max(stream.window // FRAME, 1)
        frame, offset = frame + brought, offset + brought * FRAME
        streams.asked(stream, frame - 1, at(offset - FRAME, pack))
        if offset >= until:
            return stream, frame


def test_requests_in_order_bring_more_and_more_but_a_part_of_what_was_read() -> None:
    streams = Streams()
    windows, read, frame = [], 0, 1
    while read < 8 * MIB:
        stream = streams.begin(frame, at(read), REQUEST_BYTES_MAX)
        assert stream.window <= max(read / 2, REQUEST_BYTES_MIN)
        brought = max(stream.window // FRAME, 1)
        windows.append(stream.window)
        frame, read = frame + brought, read + brought * FRAME
        streams.asked(stream, frame - 1, at(read - FRAME))
    assert windows == sorted(windows)
    assert windows[: MIB // FRAME] == [REQUEST_BYTES_MIN] * (MIB // FRAME)
    assert windows[-1] == REQUEST_BYTES_MAX


def test_no_request_brings_more_than_the_link_does_in_its_time() -> None:
    streams = Streams()
    for frame in range(3 * MIB // FRAME):
        stream = streams.begin(frame, at(frame * FRAME), 200_000)
    assert stream.window == 200_000


def test_a_request_elsewhere_begins_anew() -> None:
    streams = Streams()
    stream, frame = read_in_order(streams)
    far = streams.begin(frame, at(stream.end + 9 * MIB), REQUEST_BYTES_MAX)
    assert far.ordered > MIB  # the next frame, wherever it lies
    assert streams.begin(99, at(stream.end + 19 * MIB), REQUEST_BYTES_MAX).ordered == FRAME
    other = streams.begin(999, at(0, b"q"), REQUEST_BYTES_MAX)
    assert (other.window, other.ordered) == (REQUEST_BYTES_MIN, FRAME)


def test_only_a_pack_that_is_read_in_order_has_a_next_frame_and_room_for_gaps() -> None:
    streams = Streams()
    stream = streams.begin(1, at(0), REQUEST_BYTES_MAX)
    assert not streams.is_next(at(FRAME))
    assert stream.gap == 0
    stream, _ = read_in_order(streams)
    assert streams.is_next(at(stream.end))
    assert not streams.is_next(at(stream.end + 9 * MIB))
    assert not streams.is_next(at(0, b"q"))
    assert stream.gap > 0


@pytest.mark.parametrize(("jump", "steady"), [(0, True), (FRAME, True), (MIB, False)])
def test_a_reader_is_sure_to_go_on_after_megabytes_without_a_jump(jump: int, steady: bool) -> None:
    streams = Streams()
    stream, frame = read_in_order(streams, until=7 * MIB)
    assert not stream.is_steady
    stream = streams.begin(frame + 50, at(stream.end + jump), REQUEST_BYTES_MAX)
    streams.asked(stream, frame + 70, at(stream.end + 2 * MIB))
    assert stream.is_steady is steady


@pytest.mark.parametrize("passed", [0, 4])
def test_what_is_known_of_a_reader_holds_in_the_next_pack(passed: int) -> None:
    streams = Streams()
    stream, frame = read_in_order(streams, until=9 * MIB)
    assert stream.is_steady
    following = streams.begin(frame + passed, at(0, b"q"), REQUEST_BYTES_MAX)
    assert following.window == stream.window
    assert following.is_steady
    # Whoever comes there after that is somebody else.
    assert not streams.begin(frame + passed, at(0, b"r"), REQUEST_BYTES_MAX).is_steady


def test_frames_that_somebody_needs_count_as_read() -> None:
    streams = Streams()
    for frame in range(2 * MIB // FRAME):
        streams.asked_for(frame, at(frame * FRAME))
    assert streams.begin(frame + 1, at((frame + 1) * FRAME), REQUEST_BYTES_MAX).window > 900_000
