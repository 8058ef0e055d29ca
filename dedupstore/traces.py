"""Traces: which chunks an image's users need, in the order in which they first need them.

Owns the file (docs/traces.md) and nothing about where chunks are. A trace names chunks by content,
so one that was recorded on one version of an image is of use to the next. Pure but for `read_trace`
and `write_trace`; thread-safe.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dedupstore.constants import CHUNK_BYTES_MAX, TRACE_CHUNKS_MAX
from dedupstore.errors import SourceError, TargetError, TraceError

VERSION = 1
_HEAD = re.compile(rb"dedupstore trace ([0-9]{1,9})", re.ASCII)
_IMAGE = re.compile(rb"image ([0-9a-f]{64})", re.ASCII)
_CHUNK = re.compile(rb"([0-9a-f]{64}) ([1-9][0-9]{0,8})", re.ASCII)
_LINE_BYTES_MAX = 75
TRACE_BYTES_MAX = (TRACE_CHUNKS_MAX + 3) * _LINE_BYTES_MAX
"""What a reader takes of a file: no trace is longer."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Chunks in the order of their first use: digests, all different, and lengths in bytes; and the
    digest of the image they were recorded on."""

    image: bytes
    digests: tuple[bytes, ...]
    lengths: array[int]

    @property
    def bytes(self) -> int:
        """The chunks' bytes."""
        return sum(self.lengths)


def make_trace(image: bytes, chunks: Iterable[tuple[bytes, int]]) -> Trace:
    """A trace of (digest, length), those that come again left out."""
    first: dict[bytes, int] = {}
    for digest, length in chunks:
        first.setdefault(digest, length)
    return Trace(image, tuple(first), array("I", first.values()))


def encode_trace(trace: Trace) -> bytes:
    """The file of a trace."""
    lines = [f"dedupstore trace {VERSION}", f"image {trace.image.hex()}"]
    for digest, length in zip(trace.digests, trace.lengths, strict=True):
        lines.append(f"{digest.hex()} {length}")
    lines.append(f"end {len(trace.digests)}")
    return "\n".join(lines).encode() + b"\n"


def decode_trace(data: bytes) -> Trace:
    """The trace that a file holds. Raises TraceError, whatever the bytes are."""
    if len(data) > TRACE_BYTES_MAX:
        raise TraceError(f"more than {TRACE_CHUNKS_MAX} chunks")
    head, _, rest = data.partition(b"\n")
    version = _HEAD.fullmatch(head)
    if version is None:
        raise TraceError("does not begin as one")
    if int(version[1]) != VERSION:
        raise TraceError(f"version {int(version[1])}, and this release knows {VERSION}")
    image_line, _, rest = rest.partition(b"\n")
    image = _IMAGE.fullmatch(image_line)
    if image is None:
        raise TraceError("line 2 does not name an image")
    *lines, end, last = [b"", *rest.split(b"\n")]
    del lines[:1]
    if last or end != b"end %d" % len(lines):
        raise TraceError("it is cut off, or lacks lines")
    return make_trace(bytes.fromhex(image[1].decode()), _chunks(lines))


def _chunks(lines: list[bytes]) -> Iterable[tuple[bytes, int]]:
    for number, line in enumerate(lines, 3):
        found = _CHUNK.fullmatch(line)
        if found is None or int(found[2]) > CHUNK_BYTES_MAX:
            raise TraceError(f"line {number} is no chunk")
        yield bytes.fromhex(found[1].decode()), int(found[2])


def read_trace(path: Path) -> Trace:
    """The trace in a file. Raises SourceError, TraceError."""
    try:
        with path.open("rb") as file:
            data = file.read(TRACE_BYTES_MAX + 1)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    try:
        return decode_trace(data)
    except TraceError as error:
        raise TraceError(error.reason, str(path)) from None


def write_trace(path: Path, trace: Trace, mode: int = 0o666) -> None:
    """Write a trace, with these permissions less the umask's, in the place of what is there: whole
    or not at all. Raises TargetError."""
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with open(file, "wb") as stream:
                stream.write(encode_trace(trace))
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror}") from None
