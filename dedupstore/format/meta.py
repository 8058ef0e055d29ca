"""The records of database `meta` beside superblock and totals <-> bytes: views, origins, lost
chunks, what to fetch, remotes. Pure, thread-safe.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from dedupstore.errors import StoreDamagedError
from dedupstore.format.guards import DIGEST_BYTES, Buffer, guarded, unguarded, unpack
from dedupstore.format.superblock import SUPERBLOCK_KEY

_VIEW = struct.Struct("<32sQII")
_ORIGIN_KEY = struct.Struct("<6sQQ")
_ORIGIN = struct.Struct("<QqqB32s")
_WISH = struct.Struct("<BBHI")
_LOST_KEY = struct.Struct(">4sQ")
_LOST = struct.Struct("<32sI")
_REMOTE = struct.Struct("<I16sH")
_URL_LENGTH = struct.Struct("<H")
assert _VIEW.size == 48
assert _ORIGIN_KEY.size == 22
assert _ORIGIN.size == 57
assert _WISH.size == 8
assert _LOST_KEY.size == 12
assert _LOST.size == 36
assert _REMOTE.size == 22


# --- views ---

VIEW_KERNEL = 1
VIEW_POOL = 2
_VIEW_KEY_PREFIX = b"view"


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """An image derived from another, for mounts that share. `digest` is the manifest it is stored
    as; `homes` the digests of further views whose objects it needs; `objects` the SHA-256 of each
    file content that is an object of its own, by number, packed: gc decodes every view in each of
    its transactions. `created_ns` as in `ImageRecord`.
    """

    digest: bytes
    created_ns: int
    homes: tuple[bytes, ...] = ()
    objects: bytes = b""


def view_key(image: bytes, kind: int) -> bytes:
    """Key of database `meta`: the view of `kind` (VIEW_*) of the image with digest `image`."""
    return _VIEW_KEY_PREFIX + bytes((kind,)) + image


def decode_view_key(key: Buffer) -> tuple[bytes, int] | None:
    """(image digest, kind) of a key of database `meta`; None if it is no view's."""
    raw = bytes(key)
    if len(raw) != len(_VIEW_KEY_PREFIX) + 1 + DIGEST_BYTES or raw[:4] != _VIEW_KEY_PREFIX:
        return None
    return raw[5:], raw[4]


def encode_view(view: ViewRecord, key: bytes) -> bytes:
    """Value of a view's key."""
    counts = (len(view.homes), len(view.objects) // DIGEST_BYTES)
    body = _VIEW.pack(view.digest, view.created_ns, *counts)
    return guarded(body + b"".join((*view.homes, view.objects)), xxh3_64_intdigest(key))


def decode_view(record: Buffer, key: bytes) -> ViewRecord:
    """Return the record of a view's key."""
    what = f"view {key[5:13].hex()}"
    body = unguarded(record, what, xxh3_64_intdigest(key))
    digest, created_ns, homes, objects = unpack(_VIEW, body, what)
    assert isinstance(digest, bytes)
    assert isinstance(created_ns, int)
    assert isinstance(homes, int)
    assert isinstance(objects, int)
    digests = bytes(body[_VIEW.size :])
    if len(digests) != (homes + objects) * DIGEST_BYTES:
        raise StoreDamagedError(f"{what} record has a ragged length")
    objects_at = homes * DIGEST_BYTES
    split = tuple(split_digests(digests[:objects_at]))
    return ViewRecord(digest, created_ns, split, digests[objects_at:])


def split_digests(packed: bytes) -> Iterator[bytes]:
    """The digests, or SHA-256, that were packed one behind the other."""
    return (packed[at : at + DIGEST_BYTES] for at in range(0, len(packed), DIGEST_BYTES))


# --- origins ---

_ORIGIN_KEY_PREFIX = b"origin"


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells an unchanged file from a changed one. Times in nanoseconds since 1970."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class OriginRecord:
    """A file, as it was when it was imported, and the image it held: digest and kind (KIND_*)."""

    file: FileState
    digest: bytes
    kind: int


def origin_key(file: FileState) -> bytes:
    """Key of database `meta`: the origin record of a file."""
    return _ORIGIN_KEY.pack(_ORIGIN_KEY_PREFIX, file.device, file.inode)


def is_origin_key(key: Buffer) -> bool:
    """Whether a key of database `meta` is an origin record's."""
    return len(key) == _ORIGIN_KEY.size and bytes(key[:6]) == _ORIGIN_KEY_PREFIX


def encode_origin(origin: OriginRecord) -> bytes:
    """Value of an origin's key."""
    file = origin.file
    body = _ORIGIN.pack(file.size, file.mtime_ns, file.ctime_ns, origin.kind, origin.digest)
    return guarded(body, xxh3_64_intdigest(origin_key(file)))


def decode_origin(record: Buffer, key: bytes) -> OriginRecord:
    """Return the record of an origin's key."""
    body = unguarded(record, "origin", xxh3_64_intdigest(key))
    size, mtime_ns, ctime_ns, kind, digest = unpack(_ORIGIN, body, "origin")
    _, device, inode = _ORIGIN_KEY.unpack(key)
    file = FileState(device, inode, size, mtime_ns, ctime_ns)  # type: ignore[arg-type]
    return OriginRecord(file, digest, kind)  # type: ignore[arg-type]


# --- lost chunks ---

_LOST_KEY_PREFIX = b"lost"


@dataclass(frozen=True, slots=True)
class LostChunk:
    """What is known of a chunk whose bytes are damaged: digest, and length in bytes, 0: unknown."""

    digest: bytes
    length: int


def lost_key(ref: int) -> bytes:
    """Key of database `meta`: the lost record of the chunk that a reference led to."""
    return _LOST_KEY.pack(_LOST_KEY_PREFIX, ref)


def decode_lost_key(key: Buffer) -> int | None:
    """The reference of a key of database `meta`; None if it is no lost record's."""
    if len(key) != _LOST_KEY.size:
        return None
    prefix, ref = _LOST_KEY.unpack(key)
    return int(ref) if prefix == _LOST_KEY_PREFIX else None


def encode_lost(lost: LostChunk, key: bytes) -> bytes:
    """Value of a lost chunk's key."""
    return guarded(_LOST.pack(lost.digest, lost.length), xxh3_64_intdigest(key))


def decode_lost(record: Buffer, key: bytes) -> LostChunk:
    """Return the record of a lost chunk's key."""
    body = unguarded(record, "lost", xxh3_64_intdigest(key))
    return LostChunk(*unpack(_LOST, body, "lost"))  # type: ignore[arg-type]


# --- what to fetch of an image that is elsewhere ---

_WISH_KEY_PREFIX = b"lazy"
PREFETCH_NONE, PREFETCH_TRACE, PREFETCH_ALL = 0, 1, 2
PREFETCH_NAMES = {PREFETCH_NONE: "none", PREFETCH_TRACE: "trace", PREFETCH_ALL: "all"}
_WISH_PAUSED = 1


@dataclass(frozen=True, slots=True)
class Wish:
    """What servers are to fetch of an image that they have open, without anybody reading it:
    `prefetch` is PREFETCH_*; and not now, if `paused`."""

    prefetch: int
    paused: bool = False


def wish_key(image: bytes) -> bytes:
    """Key of database `meta`: the wish for an image digest."""
    return _WISH_KEY_PREFIX + image


def decode_wish_key(key: Buffer) -> bytes | None:
    """The image digest of a key of database `meta`; None if it is no wish's."""
    raw = bytes(key)
    prefix = len(_WISH_KEY_PREFIX)
    return (
        raw[prefix:]
        if len(raw) == prefix + DIGEST_BYTES and raw[:prefix] == _WISH_KEY_PREFIX
        else None
    )


def encode_wish(wish: Wish, key: bytes) -> bytes:
    """Value of a wish's key."""
    body = _WISH.pack(wish.prefetch, _WISH_PAUSED * wish.paused, 0, 0)
    return guarded(body, xxh3_64_intdigest(key))


def decode_wish(record: Buffer, key: bytes) -> Wish:
    """Return the record of a wish's key."""
    prefetch, flags, _, _ = unpack(_WISH, unguarded(record, "lazy", xxh3_64_intdigest(key)), "lazy")
    if prefetch not in PREFETCH_NAMES:
        raise StoreDamagedError(f"lazy record asks for {prefetch}")
    return Wish(prefetch, bool(flags & _WISH_PAUSED))  # type: ignore[operator]


# --- remotes ---

_REMOTE_KEY_PREFIX = b"remote"
REMOTE_NAME_BYTES_MAX = 64


@dataclass(frozen=True, slots=True)
class RemoteRecord:
    """A remote that the store knows: its number in place records, its UUID, the URLs of it and of
    its mirrors, at least one."""

    number: int
    uuid: bytes
    urls: tuple[str, ...]


def remote_key(name: str) -> bytes:
    """Key of database `meta`: the remote of this name."""
    return _REMOTE_KEY_PREFIX + name.encode()


def decode_remote_key(key: Buffer) -> str | None:
    """The name in a key of database `meta`; None if it is no remote's."""
    raw = bytes(key)
    name = raw[len(_REMOTE_KEY_PREFIX) :]
    if not raw.startswith(_REMOTE_KEY_PREFIX) or not 1 <= len(name) <= REMOTE_NAME_BYTES_MAX:
        return None
    try:
        return name.decode()
    except UnicodeDecodeError:
        return None


def encode_remote(remote: RemoteRecord, key: bytes) -> bytes:
    """Value of a remote's key."""
    urls = [url.encode() for url in remote.urls]
    body = _REMOTE.pack(remote.number, remote.uuid, len(urls))
    body += b"".join(_URL_LENGTH.pack(len(url)) + url for url in urls)
    return guarded(body, xxh3_64_intdigest(key))


def decode_remote(record: Buffer, key: bytes) -> RemoteRecord:
    """Return the record of a remote's key."""
    body = unguarded(record, "remote", xxh3_64_intdigest(key))
    number, uuid, count = unpack(_REMOTE, body, "remote")
    rest, urls = bytes(body[_REMOTE.size :]), []
    while len(rest) >= _URL_LENGTH.size:
        end = _URL_LENGTH.size + int(_URL_LENGTH.unpack_from(rest)[0])
        urls.append(rest[_URL_LENGTH.size : end].decode(errors="replace"))
        if end > len(rest):
            break
        rest = rest[end:]
    if rest or not urls or len(urls) != count:
        raise StoreDamagedError("remote record has a ragged length")
    return RemoteRecord(number, uuid, tuple(urls))  # type: ignore[arg-type]


# --- what is in database `meta`, and mending ---


def meta_kind(key: Buffer) -> str | None:
    """What kind of record a key of database `meta` stands for; None: this release knows none."""
    if bytes(key) in (SUPERBLOCK_KEY, b"totals"):
        return bytes(key).decode()
    if decode_view_key(key) is not None:
        return "view"
    if is_origin_key(key):
        return "origin"
    if decode_wish_key(key) is not None:
        return "lazy"
    if decode_lost_key(key) is not None:
        return "lost"
    return None if decode_remote_key(key) is None else "remote"
