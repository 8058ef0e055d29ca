"""Archives, and what of compression is around them (`archives`, `sources.spool`, `trees`).

An input is a file, as a user would import it. Promises: none of a tar archive's in it, SourceError,
or an image within the stated size that reads back as a tree without a name that leads anywhere.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import zstandard

from dedupstore import archives, trees
from dedupstore.erofs import read_tree
from dedupstore.erofs.tree import Directory
from dedupstore.errors import SourceError
from dedupstore.sources import spool
from tools.fuzzing.messages import check_message

BYTES_MAX = 1 << 15
_BUILT_BYTES_MAX = 1 << 20
_UNPACKED_BYTES_MAX = 1 << 22  # below the product's bound, for speed
_SPOOL = Path(tempfile.gettempdir())


def run(data: bytes) -> None:
    file = os.memfd_create("archive")
    try:
        os.write(file, data)
        _import(file)
    except SourceError as error:
        check_message(error)
    finally:
        os.close(file)


def _import(file: int) -> None:
    path = Path(f"/proc/self/fd/{file}")
    opener = archives.find_opener(path)
    if opener is None:
        return
    if opener is archives.open_plain:
        _build(file)
        return
    with opener(path) as stream:
        unpacked = spool(stream, _SPOOL, "archive", _UNPACKED_BYTES_MAX)
    try:
        _build(unpacked.fileno())
    finally:
        unpacked.close()


def _build(file: int) -> None:
    source = trees.from_archive(file, "archive")
    stored = os.fstat(file).st_blocks * 512
    assert source.size <= stored * trees.IMAGE_PER_ARCHIVE_BYTE + trees.IMAGE_BYTES_MIN
    if source.size > _BUILT_BYTES_MAX:
        return
    image = bytearray(source.size)
    for segment in source.segments():
        part = source.read_segment(segment.offset, segment.length)
        assert len(part) == segment.length
        image[segment.offset : segment.offset + len(part)] = part
    root = read_tree(lambda offset, length: bytes(image[offset : offset + length]), len(image))
    pending = [root]
    while pending:
        for name, node in pending.pop().entries.items():
            assert name not in (b"", b".", b"..")
            assert b"/" not in name
            if isinstance(node, Directory):
                pending.append(node)


def _tar(form: int) -> bytes:
    out = io.BytesIO()
    kinds = {
        "file": tarfile.REGTYPE,
        "folder": tarfile.DIRTYPE,
        "folder/link": tarfile.SYMTYPE,
        "hard": tarfile.LNKTYPE,
        "tty": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
        "n" * 120: tarfile.REGTYPE,
    }
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = "file" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            member.size = 5 if kind == tarfile.REGTYPE else 0
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {
                    "SCHILY.xattr.user.note": "v",
                    "mtime": "1.5",
                    "SCHILY.acl.access": "user::rw-,user:7:r--,group::r--,mask::r--,other::---",
                }
            tar.addfile(member, io.BytesIO(b"12345"))
    return out.getvalue()[: out.getvalue().rindex(b"12345") + 512].ljust(1 << 13, b"\0")


def header(name: bytes, kind: bytes, size: int, link: bytes = b"") -> bytes:
    raw = bytearray(512)
    fields = {0: name, 100: b"0000644\0" * 3, 124: b"%011o\0" % size, 136: b"%011o\0" % 0}
    fields |= {148: b" " * 8, 156: kind, 157: link, 257: b"ustar\x0000"}
    for at, value in fields.items():
        raw[at : at + len(value)] = value
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def pax(records: Mapping[bytes, bytes], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records.items():
        length = len(key) + len(value) + 3
        length += len(b"%d" % (length + len(b"%d" % length)))
        body += b"%d %s=%s\n" % (length, key, value)
    return header(b"pax", kind, len(body)) + body.ljust(-(-len(body) // 512) * 512, b"\0")


def seeds() -> Mapping[str, bytes]:
    gnu, posix = _tar(tarfile.GNU_FORMAT), _tar(tarfile.PAX_FORMAT)
    end = bytes(1024)
    sparse = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"9999"}
    hole = {b"GNU.sparse.map": b"0,3,9000,2", b"GNU.sparse.size": b"9002"}
    long_name = header(b"././@LongLink", b"L", 3) + b"ab\0".ljust(512, b"\0")
    escapes = [header(b"../up", b"0", 0), header(b"/etc/passwd", b"0", 0)]
    escapes += [header(b"out", b"2", 0, b"/etc"), header(b"out/passwd", b"0", 0)]
    return {
        "gnu": gnu,
        "pax": posix,
        "gzip": gzip.compress(gnu, mtime=0),
        "bzip2": bz2.compress(gnu),
        "xz": lzma.compress(gnu),
        "zstd": zstandard.compress(gnu),
        "xz-twice": lzma.compress(gnu) + bytes(8) + lzma.compress(b"more"),
        "sparse": pax(sparse) + header(b"s", b"0", 515) + b"1\n9000\n3\n".ljust(512, b"\0")
        + b"abc".ljust(512, b"\0") + end,
        "map": pax(hole) + header(b"s", b"0", 5) + b"abcde".ljust(512, b"\0") + end,
        "global": pax({b"comment": b"c", b"path": b"p"}, b"g") + header(b"f", b"0", 0) + end,
        "long-name": long_name * 3 + header(b"f", b"0", 0) + end,
        "escapes": b"".join(escapes) + end,
        "up": escapes[0] + end,
        "through-link": b"".join(escapes[2:]) + end,
        "negative": pax({b"size": b"-1024"}) + header(b"f", b"0", 0) + end,
        "replaced": header(b"d/f", b"0", 0) + header(b"d", b"0", 0) + end,
    }  # fmt: skip
