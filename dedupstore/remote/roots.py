"""Root documents: what an image's name stands for in a remote (docs/remote-format.md, "Root
document"), with all that whoever pulls it needs to know.

Pure functions over bytes that survive any input: see `layout`. Thread-safe.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.constants import IMAGE_NAME_BYTES_MAX
from dedupstore.errors import RemoteDamagedError, TraceError
from dedupstore.remote.layout import (
    IMAGE_BYTES_MAX,
    MANIFEST_BYTES_MAX,
    Fields,
    encode_fields,
    image_path,
)
from dedupstore.remote.packs import BUNDLE_BYTES_MAX
from dedupstore.traces import TRACE_BYTES_MAX, Trace, decode_trace, encode_trace

ROOT_VERSION = 2
_LINE_ALONE = 1  # the manifest was an object of its own

LINE_BYTES_MAX = 4096
"""The first line has fewer bytes: the name, six times as long if it is escaped, and little else."""
ROOT_BYTES_MAX = LINE_BYTES_MAX + MANIFEST_BYTES_MAX + TRACE_BYTES_MAX + BUNDLE_BYTES_MAX
"""What a reader of whole documents accepts."""

_KINDS = {name: kind for kind, name in fmt.KIND_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Parts:
    """What follows the first line: the manifest's bytes, the trace that the image was pushed with,
    packed, and a bundle of indexes, either of which may be empty."""

    manifest: bytes
    trace: bytes = b""
    indexes: bytes = b""


@dataclass(frozen=True, slots=True)
class Root:
    """What a name stands for in a remote. `kind` is a fmt.KIND_ constant, `created` in seconds
    since 1970, `manifest` the manifest's id, `manifest_bytes` its length. `manifest_at` is where in
    the document that was read the manifest is, 0: it is an object of its own. `parts` is None where
    there are none, or only the first line was read."""

    name: str
    digest: bytes
    size: int
    kind: int
    created: float
    manifest: bytes
    manifest_bytes: int
    parts: Parts | None = None
    manifest_at: int = field(default=0, compare=False)


def encode_root(root: Root) -> bytes:
    """The root document of an image; without parts, one of version 1."""
    fields = {
        "name": root.name,
        "digest": root.digest.hex(),
        "size": root.size,
        "kind": fmt.KIND_NAMES[root.kind],
        "created": root.created,
        "manifest": root.manifest.hex(),
        "manifest_bytes": root.manifest_bytes,
    }
    parts = root.parts
    if parts is None:
        return encode_fields(fields, _LINE_ALONE)
    rest = b"".join((parts.manifest, parts.trace, parts.indexes))
    fields["trace_bytes"], fields["indexes_bytes"] = len(parts.trace), len(parts.indexes)
    fields["parts"] = blake3(rest).hexdigest()
    return encode_fields(fields, ROOT_VERSION) + rest


def decode_root(data: bytes, path: str) -> Root | None:
    """The root document that was found at `path`; None if it says that the image was deleted."""
    return _decode(data, path, whole=True)


def decode_beginning(data: bytes, path: str) -> Root | None:
    """As `decode_root` of the first LINE_BYTES_MAX bytes, without parts."""
    return _decode(data, path, whole=False)


def _decode(data: bytes, path: str, *, whole: bool) -> Root | None:
    if not data:
        return None
    line, _, rest = data.partition(b"\n")
    fields = Fields(line, path, ROOT_VERSION)
    name = fields.text("name")
    try:
        at_home = 1 <= len(name.encode()) <= IMAGE_NAME_BYTES_MAX and image_path(name) == path
    except UnicodeEncodeError:
        at_home = False
    if not at_home:
        raise RemoteDamagedError(f"{path}: is of another image")
    kind = _KINDS.get(fields.text("kind"))
    if kind is None:
        raise RemoteDamagedError(f"{path}: unknown kind of image (use a newer dedupstore)")
    alone = fields.version != ROOT_VERSION
    if whole and alone and rest:
        raise RemoteDamagedError(f"{path}: has more than its line")
    return Root(
        name,
        fields.digest("digest"),
        fields.integer("size", IMAGE_BYTES_MAX),
        kind,
        fields.number("created"),
        fields.digest("manifest"),
        fields.integer("manifest_bytes", MANIFEST_BYTES_MAX),
        _parts(fields, rest, path) if whole and not alone else None,
        0 if alone else len(line) + 1,
    )


def _parts(fields: Fields, rest: bytes, path: str) -> Parts:
    if blake3(rest).digest() != fields.digest("parts"):
        raise RemoteDamagedError(f"{path}: what follows its first line does not have its digest")
    manifest_bytes = fields.integer("manifest_bytes", MANIFEST_BYTES_MAX)
    trace_bytes = fields.integer("trace_bytes", TRACE_BYTES_MAX)
    indexes_bytes = fields.integer("indexes_bytes", BUNDLE_BYTES_MAX)
    if len(rest) != manifest_bytes + trace_bytes + indexes_bytes:
        raise RemoteDamagedError(f"{path}: its parts do not fill it")
    end = manifest_bytes + trace_bytes
    return Parts(rest[:manifest_bytes], rest[manifest_bytes:end], rest[end:])


# --- parts ---


def pack_trace(trace: Trace) -> bytes:
    """The trace of a root document."""
    return zstandard.ZstdCompressor(level=9).compress(encode_trace(trace))


def unpack_trace(data: bytes) -> Trace | None:
    """The trace of a root document; None: there is none, or none that this release knows. It only
    says what to fetch first, and is no reason not to pull."""
    with suppress(TraceError, zstandard.ZstdError):
        if data and zstandard.frame_content_size(data) <= TRACE_BYTES_MAX:
            return decode_trace(zstandard.ZstdDecompressor().decompress(data))
    return None
