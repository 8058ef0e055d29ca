"""Trace files, which come from other hosts (`traces`).

An input is a file; by its first byte also with the lines that a trace begins and ends with around
it. Promises: a TraceError of one line, or a trace of chunks that are all different, no longer than
chunks are, that is read as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping

from blake3 import blake3

from dedupstore.constants import CHUNK_BYTES_MAX
from dedupstore.errors import TraceError
from dedupstore.traces import decode_trace, encode_trace, make_trace
from tools.fuzzing.messages import check_message

BYTES_MAX = 2048

_IMAGE = blake3(b"image").digest()
_COMPLETE = 1


def run(data: bytes) -> None:
    file = data[1:]
    if data[:1] and data[0] & _COMPLETE:
        head = b"dedupstore trace 1\nimage " + _IMAGE.hex().encode() + b"\n"
        lines = file + b"\n" if file else b""
        file = head + lines + b"end %d\n" % lines.count(b"\n")
    try:
        trace = decode_trace(file)
    except TraceError as error:
        check_message(error)
        return
    assert len(set(trace.digests)) == len(trace.digests) == len(trace.lengths)
    assert all(len(digest) == 32 for digest in (trace.image, *trace.digests))
    assert all(0 < length <= CHUNK_BYTES_MAX for length in trace.lengths)
    assert decode_trace(encode_trace(trace)) == trace


def seeds() -> Mapping[str, bytes]:
    chunks = [(blake3(bytes([i])).digest(), 4096 << i) for i in range(5)]
    whole = encode_trace(make_trace(_IMAGE, chunks))
    lines = whole.split(b"\n")[2:-2]
    return {
        "whole": b"\x00" + whole,
        "empty": b"\x00" + encode_trace(make_trace(_IMAGE, [])),
        "newer": b"\x00" + whole.replace(b"trace 1", b"trace 2"),
        "cut": b"\x00" + whole[:200],
        "chunks": b"\x01" + b"\n".join(lines),
        "twice": b"\x01" + b"\n".join(lines * 2),
        "long-chunk": b"\x01" + lines[0].replace(b" 4096", b" 999999999"),
        "no-length": b"\x01" + lines[0][:64],
        "none": b"\x01",
    }
