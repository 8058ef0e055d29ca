"""Telling readers in order from others: what a request may bring grows only for the former."""

from __future__ import annotations

import pytest

from dedupstore.places import Place
from dedupstore.remote.streams import REQUEST_BYTES_MAX, REQUEST_BYTES_MIN, Stream, Streams

FRAME = 100_000
MIB = 1 << 20


def at(offset: int, pack: bytes = b"p") -> Place:
    return Place(1, pack * 32, offset, FRAME)


def read_in_order(streams: Streams, pack: bytes = b"p", until: int = 3 * MIB) -> Stream:
    """Requests one behind the other, each as long as it may be."""
    offset = 0
    while True:
        stream = streams.begin(at(offset, pack), REQUEST_BYTES_MAX)
        offset += max(stream.window, FRAME)
        streams.asked(stream, offset)
        if offset >= until:
            return stream


def test_requests_in_order_bring_more_and_more_up_to_what_the_link_brings() -> None:
    streams = Streams()
    windows = []
    offset = 0
    for _ in range(8):
        windows.append(streams.begin(at(offset), REQUEST_BYTES_MAX).window)
        offset += max(windows[-1], FRAME)
    assert windows == [min(REQUEST_BYTES_MIN << n, REQUEST_BYTES_MAX) for n in range(8)]
    assert read_in_order(Streams()).window == REQUEST_BYTES_MAX
    slow = Streams()
    for offset in range(0, MIB, FRAME):
        stream = slow.begin(at(offset), 200_000)
    assert stream.window == 200_000


def test_a_request_elsewhere_begins_anew() -> None:
    streams = Streams()
    stream = read_in_order(streams)
    assert streams.begin(at(stream.end + 3 * MIB), REQUEST_BYTES_MAX).window == REQUEST_BYTES_MIN
    assert streams.begin(at(0, b"q"), REQUEST_BYTES_MAX).window == REQUEST_BYTES_MIN


def test_only_a_pack_that_is_read_in_order_has_a_next_frame_and_room_for_gaps() -> None:
    streams = Streams()
    stream = streams.begin(at(0), REQUEST_BYTES_MAX)
    assert not streams.is_next(at(FRAME))
    assert stream.gap == 0
    stream = read_in_order(streams)
    assert streams.is_next(at(stream.end))
    assert not streams.is_next(at(stream.end + 5 * MIB))
    assert not streams.is_next(at(0, b"q"))
    assert stream.gap > 0


@pytest.mark.parametrize(("jump", "steady"), [(0, True), (FRAME, True), (MIB, False)])
def test_a_reader_is_sure_to_go_on_after_megabytes_without_a_jump(jump: int, steady: bool) -> None:
    streams = Streams()
    stream = read_in_order(streams, until=7 * MIB)
    assert not stream.is_steady
    stream = streams.begin(at(stream.end + jump), REQUEST_BYTES_MAX)
    streams.asked(stream, stream.end + 2 * MIB)
    assert stream.is_steady is steady


def test_what_is_known_of_a_reader_holds_in_the_next_pack() -> None:
    streams = Streams()
    stream = read_in_order(streams, until=9 * MIB)
    assert stream.is_steady
    following = streams.begin(at(0, b"q"), REQUEST_BYTES_MAX, stream)
    assert following.window == stream.window
    assert following.is_steady
