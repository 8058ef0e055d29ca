"""Small EROFS images for seeds: trees that the project's writer lays out, and drawings by hand of
the layouts that it does not write. Owns no properties; pure."""

from __future__ import annotations

import io
import stat
import struct

from dedupstore.erofs.layouts import (
    ADVISE_BIG_PCLUSTER,
    ADVISE_EXTENTS,
    ADVISE_FRAGMENT,
    ADVISE_INLINE_PCLUSTER,
    CHUNK_BASED,
    CHUNK_INDEXES,
    COMPRESSED_COMPACT,
    COMPRESSED_FULL,
    FLAT_INLINE,
    FLAT_PLAIN,
)
from dedupstore.erofs.superblock import (
    COMPAT_FINGERPRINTS,
    COMPAT_PLAIN_XATTR_PREFIXES,
    COMPAT_SHARED_XATTRS_IN_METABOX,
    INCOMPAT_DEVICE_TABLE,
    INCOMPAT_KNOWN,
    INCOMPAT_METABOX,
    METABOX_NID_FLAG,
    SUPERBLOCK_OFFSET,
    SuperblockRecord,
)
from dedupstore.erofs.tree import Attributes, Directory, Node, RegularFile, Special, Symlink
from dedupstore.erofs.writer import write_image

_BITS = 9
_BLOCK = 1 << _BITS
_BLOCKS = 16
_ROOT = 42  # nids count 32 bytes
_FIRST, _STEP = 64, 8
_XATTR_BLOCK = 12


class Bytes:
    """Contents that are held in memory."""

    def __init__(self, data: bytes) -> None:
        self._stream = data

    def opened(self) -> Bytes:
        return self

    def __enter__(self) -> Bytes:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, offset: int, buffer: memoryview) -> int:
        part = self._stream[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)


def _file(data: bytes, **attributes: object) -> RegularFile:
    extents = ((0, len(data)),) if data else ()
    return RegularFile(Attributes(0o644, **attributes), len(data), extents, Bytes(data))  # type: ignore[arg-type]


def written(*, fingerprints: bool) -> bytes:
    """A little of everything that the writer writes."""
    shared = {b"user.a": b"shared", b"security.selinux": b"system_u:object_r:etc_t:s0"}
    twice = _file(b"twice")
    sparse = Bytes(b"x".rjust(5000) + bytes(4000))
    entries: dict[bytes, Node] = {
        b"file": _file(b"contents" * 100, xattrs=shared),
        b"small": _file(b"s", xattrs=shared, uid=70_000, mtime=5),
        b"empty": _file(b""),
        b"sparse": RegularFile(Attributes(0o600), 9000, ((4096, 512), (8192, 10)), sparse),
        b"link": Symlink(Attributes(0o777), b"file"),
        b"fifo": Special(Attributes(0o644), stat.S_IFIFO),
        b"tty": Special(Attributes(0o644), stat.S_IFCHR, 5, 1),
        b"one": twice,
        b"two": twice,
    }
    deep = Directory(Attributes(0o755), {b"n%02d" % i: _file(b"") for i in range(9)})
    entries[b"deep"] = Directory(Attributes(0o755), {b"deeper": deep})
    out = io.BytesIO()
    write_image(
        Directory(Attributes(0o755), entries),
        out,
        block_bytes=_BLOCK,
        fingerprints=fingerprints,
    )
    return out.getvalue()


def _inode(layout: int, mode: int, size: int, first: int = 0, xattrs: int = 0) -> bytes:
    return struct.pack("<HHHHIIIIHH4x", layout << 1, xattrs, mode, 1, size, 0, first, 1, 0, 0)


def _draw(
    *children: bytes,
    at: dict[int, bytes] | None = None,
    more: tuple[tuple[bytes, int], ...] = (),
    blocks: int = _BLOCKS,
    **fields: int,
) -> bytes:
    names = [(b".", _ROOT), (b"..", _ROOT), *more]
    names += [(b"%c" % (97 + i), _FIRST + _STEP * i) for i in range(len(children))]
    position = 12 * len(names)
    head = tail = b""
    for name, nid in names:
        head += struct.pack("<QHBB", nid, position, 0, 0)
        position += len(name)
        tail += name
    root = _inode(FLAT_INLINE, stat.S_IFDIR | 0o755, len(head + tail)) + head + tail
    image = bytearray(blocks * _BLOCK)
    record = SuperblockRecord(
        block_bits=_BITS,
        root_nid_short=_ROOT,
        blocks_low=blocks,
        xattr_block=_XATTR_BLOCK,
        **fields,  # type: ignore[arg-type]
    )
    parts = {SUPERBLOCK_OFFSET: record.pack(), _ROOT * 32: root}
    parts |= {(_FIRST + _STEP * i) * 32: child for i, child in enumerate(children)}
    for offset, data in (parts | (at or {})).items():
        image[offset : offset + len(data)] = data
    return bytes(image)


def _map_header(advise: int, low: int = 0, cluster_bits: int = 0) -> bytes:
    return struct.pack("<IHBB", low, advise, 0, cluster_bits)


def drawn() -> dict[str, bytes]:
    """Images of the layouts that the writer does not write, by name."""
    regular = stat.S_IFREG | 0o644
    compact = _inode(COMPRESSED_COMPACT, regular, 3000, 2)
    packs = struct.pack("<HHI", 1 << 12, 0, 7) * 6
    full = _inode(COMPRESSED_FULL, regular, 2000, 2)
    indexes = b"".join(struct.pack("<HHI", kind, 0, 8 + i) for i, kind in enumerate((1, 1, 2, 1)))
    chunks = _inode(CHUNK_BASED, regular, 2048, CHUNK_INDEXES)
    index = b"".join(struct.pack("<HHI", 0, 0, block) for block in (8, 9, 0xFFFFFFFF, 11))
    table = _inode(CHUNK_BASED, regular, 2048) + struct.pack("<4I", 8, 10, 0xFFFFFFFF, 11)
    folder = _inode(CHUNK_BASED, stat.S_IFDIR | 0o755, 30)
    listing = struct.pack("<QHBB", _ROOT, 24, 0, 2) + struct.pack("<QHBB", _ROOT, 25, 0, 2) + b"..."
    xattrs = struct.pack("<IB7xI", 0, 1, 3) + struct.pack("<BBH", 1, 0x81, 2) + b"nv1."
    shared = bytes(12) + struct.pack("<BBH", 3, 1, 4) + b"abcdata"
    prefixes = struct.pack("<HB", 5, 1) + b"long\0" + struct.pack("<HB", 5, 4) + b"more"
    boxed = _inode(FLAT_INLINE, regular, 3) + b"abc"
    packed = _inode(FLAT_INLINE, regular, len(prefixes)) + prefixes
    far = 40 * _BLOCK // 32  # beyond what one read takes in
    return {
        "metabox": _draw(
            _inode(FLAT_PLAIN, regular, _BLOCK, 10),
            at={SUPERBLOCK_OFFSET + 128: struct.pack("<Q", _FIRST), 10 * _BLOCK: boxed},
            more=((b"boxed", METABOX_NID_FLAG),),
            feature_incompat=INCOMPAT_METABOX,
            feature_compat=COMPAT_SHARED_XATTRS_IN_METABOX,
            extension_slots=1,
        ),
        "packed-prefixes": _draw(packed, packed_nid=_FIRST, xattr_prefix_count=2),
        "far": _draw(boxed, at={far * 32: boxed}, more=((b"far", far),), blocks=42),
        "compact": _draw(compact + _map_header(0) + packs),
        "compact-big": _draw(compact + _map_header(ADVISE_BIG_PCLUSTER | 1) + packs * 4),
        "full": _draw(full + _map_header(0) + bytes(8) + indexes),
        "full-tail": _draw(
            full + _map_header(ADVISE_INLINE_PCLUSTER, 1 << 16) + bytes(8) + indexes
        ),
        "extents": _draw(
            full + _map_header(ADVISE_EXTENTS) + struct.pack("<Q4I", 4096, *[600] * 4)
        ),
        "extents-16": _draw(
            full + _map_header(ADVISE_EXTENTS | 2 << 1, 2) + struct.pack("<IQ4x", 700, 4096) * 2
        ),
        "extents-8": _draw(
            full + _map_header(ADVISE_EXTENTS | 1 << 1 | ADVISE_FRAGMENT)
            + struct.pack("<II", 700, 4096) * 4
        ),
        "fragment": _draw(full + _map_header(0, 5, 0x80), packed_nid=_FIRST),
        "indexes": _draw(chunks + bytes(0) + index),
        "table": _draw(table),
        "folder": _draw(folder + struct.pack("<I", 9), at={9 * _BLOCK: listing}),
        "devices": _draw(
            chunks + index.replace(b"\0\0\0\0\x09", b"\0\0\x01\0\x09"),
            feature_incompat=INCOMPAT_DEVICE_TABLE | 4,
            extra_devices=1,
        ),
        "xattrs": _draw(
            _inode(FLAT_INLINE, regular, 3, xattrs=1 + len(xattrs[12:]) // 4) + xattrs + b"abc",
            at={_XATTR_BLOCK * _BLOCK: shared, 7 * _BLOCK: prefixes},
            feature_compat=COMPAT_PLAIN_XATTR_PREFIXES | COMPAT_FINGERPRINTS,
            xattr_prefix_count=2,
            xattr_prefix_start=7 * _BLOCK // 4,
            fingerprint_prefix=0,
        ),
        "wide": _draw(compact + _map_header(0) + packs, feature_incompat=INCOMPAT_KNOWN & ~0x108,
                      root_nid=_ROOT),
    }  # fmt: skip
