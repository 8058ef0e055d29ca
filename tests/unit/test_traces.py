"""Trace files: what is written is read back, and nothing else is taken for a trace."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from blake3 import blake3

from dedupstore.constants import CHUNK_BYTES_MAX
from dedupstore.errors import SourceError, TargetError, TraceError
from dedupstore.traces import Trace, decode_trace, encode_trace, make_trace, read_trace, write_trace

IMAGE = blake3(b"image").digest()
TRACE = make_trace(IMAGE, [(blake3(bytes([i])).digest(), 4096 + i) for i in range(50)])


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for trace in (TRACE, Trace(IMAGE, (), array("I"))):
        write_trace(path, trace)
        assert read_trace(path) == trace


def test_a_chunk_that_comes_again_is_left_out() -> None:
    one, other = TRACE.digests[:2]
    assert make_trace(IMAGE, [(one, 5), (other, 6), (one, 5)]).digests == (one, other)


def test_the_file_is_lines_of_text() -> None:
    text = encode_trace(TRACE).decode()
    assert text.splitlines()[0] == "dedupstore trace 1"
    assert text.splitlines()[1] == f"image {IMAGE.hex()}"
    assert text.splitlines()[2] == f"{TRACE.digests[0].hex()} 4096"
    assert text.endswith("end 50\n")


GOOD = encode_trace(TRACE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        GOOD[:-1],
        GOOD + b"x",
        GOOD[: len(GOOD) // 2],
        GOOD.replace(b"end 50", b"end 49"),
        GOOD.replace(b" 4096\n", b" 0\n"),
        GOOD.replace(b" 4096\n", b" %d\n" % (CHUNK_BYTES_MAX + 1)),
        GOOD.replace(b"image", b"Image"),
        GOOD.replace(b" 4096\n", b" 4096 \n"),
        b"\xff" + GOOD,
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(TraceError, match="not a trace"):
        decode_trace(data)


def test_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match="version 2, and this release knows 1"):
        decode_trace(GOOD.replace(b"trace 1", b"trace 2"))


def test_a_trace_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.mkdir()
    (path / "file").touch()
    with pytest.raises(TargetError, match="there"):
        write_trace(path, TRACE)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with pytest.raises(SourceError, match="No such file"):
        read_trace(tmp_path / "gone")
