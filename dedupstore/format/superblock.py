"""The superblock, feature flags and totals of a store <-> bytes. Pure, thread-safe."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from dedupstore.errors import StoreDamagedError, StoreVersionError
from dedupstore.format.guards import GUARD_BYTES, Buffer, guarded, unguarded, unpack

FORMAT_VERSION = 1

# Feature flags, after composefs and ext4: a release refuses a store with an incompatible flag it
# does not know, only reads one with a read-only-compatible flag, and ignores compatible flags.
# Set with the first frame whose bytes are in a remote. Incompatible: a release that does not know
# such frames takes them for damage.
FEATURE_INCOMPAT_REMOTE = 1
FEATURES_INCOMPAT_KNOWN = FEATURE_INCOMPAT_REMOTE
FEATURES_READONLY_COMPAT_KNOWN = 0
# Set with the first view record. Compatible: a release without views reclaims them like any image
# that lost its name, and leaves records that lead nowhere, which count as none.
FEATURE_COMPAT_VIEWS = 1
# Set with the first origin record. Compatible: a release without origins leaves the records alone,
# and one whose manifest is gone counts as none.
FEATURE_COMPAT_ORIGINS = 2
# Set with the first lost record. Compatible: a release without them leaves the records alone, and
# imports store a lost chunk anew whether they know of the record or not.
FEATURE_COMPAT_LOST = 4
# Set with the first remote record. Compatible: it only says where things may be had.
FEATURE_COMPAT_REMOTES = 8
FEATURES_COMPAT_KNOWN = (
    FEATURE_COMPAT_VIEWS | FEATURE_COMPAT_ORIGINS | FEATURE_COMPAT_LOST | FEATURE_COMPAT_REMOTES
)
_SUPER = struct.Struct("<8sHHIII16sQ")
_TOTALS = struct.Struct("<QQQQQ")

assert _SUPER.size == 48
assert _TOTALS.size == 40

SUPER_MAGIC = b"dedupSTR"
SUPERBLOCK_KEY = b"superblock"


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a store is: version, feature flags, identity. Key `superblock` of database `meta`."""

    uuid: bytes
    created_ns: int
    version: int = FORMAT_VERSION
    features_compat: int = 0
    features_readonly_compat: int = 0
    features_incompat: int = 0


def encode_superblock(sb: Superblock) -> bytes:
    """Return the record, guard included."""
    body = _SUPER.pack(
        SUPER_MAGIC,
        sb.version,
        0,
        sb.features_compat,
        sb.features_readonly_compat,
        sb.features_incompat,
        sb.uuid,
        sb.created_ns,
    )
    return guarded(body)


def decode_superblock(record: Buffer) -> Superblock:
    """Return the superblock; the caller decides with `check_superblock` whether it may go on."""
    body = unguarded(record, "superblock")
    magic, version, _, compat, readonly_compat, incompat, uuid, created = unpack(
        _SUPER, body, "superblock"
    )
    if magic != SUPER_MAGIC:
        raise StoreDamagedError("superblock has no dedupstore magic")
    return Superblock(uuid, created, version, compat, readonly_compat, incompat)  # type: ignore[arg-type]


def with_incompatible(record: Buffer, features: int) -> bytes:
    """A superblock with incompatible feature flags set. Raises StoreDamagedError."""
    sb = decode_superblock(record)
    return encode_superblock(replace(sb, features_incompat=sb.features_incompat | features))


def guess_superblock(record: Buffer) -> Superblock | None:
    """The superblock of a record whose guard fails, if magic, version and flags are such that this
    release wrote it; identity and creation are then as they are found."""
    if len(record) != GUARD_BYTES + _SUPER.size:
        return None
    magic, version, _, compat, readonly_compat, incompat, uuid, created = _SUPER.unpack_from(
        record, GUARD_BYTES
    )
    known = magic == SUPER_MAGIC and version == FORMAT_VERSION
    unknown = incompat & ~FEATURES_INCOMPAT_KNOWN or compat & ~FEATURES_COMPAT_KNOWN
    if not known or readonly_compat or unknown:
        return None
    return Superblock(uuid, created, version, compat, 0, incompat)


def check_superblock(sb: Superblock, where: str, *, writing: bool = True) -> None:
    """Raise StoreVersionError unless this release may read, and if `writing` write, the store."""
    if sb.version > FORMAT_VERSION:
        raise StoreVersionError(
            f"{where}: store has format version {sb.version}, this release knows up to "
            f"{FORMAT_VERSION} (use a newer dedupstore)"
        )
    unknown = sb.features_incompat & ~FEATURES_INCOMPAT_KNOWN
    if writing:
        unknown |= sb.features_readonly_compat & ~FEATURES_READONLY_COMPAT_KNOWN
    if unknown:
        raise StoreVersionError(
            f"{where}: store uses features {unknown:#x} that this release does not know "
            "(use a newer dedupstore)"
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Running sums over `frames` and the next frame number. Key `totals` of database `meta`.

    `frame_next` only grows: a number is never used twice, so that a server which still caches a
    reclaimed frame can never mistake a new one for it.
    """

    frame_next: int = 1
    frames: int = 0
    chunks: int = 0
    unique_bytes: int = 0
    stored_bytes: int = 0


def encode_totals(totals: Totals) -> bytes:
    """Return the record, guard included."""
    return guarded(
        _TOTALS.pack(
            totals.frame_next,
            totals.frames,
            totals.chunks,
            totals.unique_bytes,
            totals.stored_bytes,
        )
    )


def decode_totals(record: Buffer) -> Totals:
    """Return the totals."""
    return Totals(*unpack(_TOTALS, unguarded(record, "totals"), "totals"))  # type: ignore[arg-type]
