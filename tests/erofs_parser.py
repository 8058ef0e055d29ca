"""An uncompressed EROFS image as a plain dictionary: what tests hold the writer against.

Written from erofs_fs.h alone and sharing no code with the package, slow and strict: every structure
must lie where the kernel looks for it.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass

NULL = 0xFFFFFFFF
PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
FILE_TYPES = (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO)
FILE_TYPES += (stat.S_IFSOCK, stat.S_IFLNK)


@dataclass
class Inode:
    nid: int
    mode: int
    links: int
    size: int
    uid: int
    gid: int
    mtime_ns: int  # since 1970, seconds included
    rdev: tuple[int, int]
    number: int
    xattrs: dict[bytes, bytes]
    hidden: dict[bytes, bytes]  # attributes of no namespace, such as fingerprints
    content: bytes
    blocks: list[tuple[int, int]]  # byte ranges of the image


class Image:
    """All names of an image, by path ("" is the root), and the superblock's fields."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        fields = struct.unpack_from("<IIIBBHQqIIII16s16sIHHHBBIQBB2xIQ", data, 1024)
        (magic, _, self.compat, self.bits, extensions, self.root, self.inodes) = fields[:7]
        (self.epoch, self.nsec, self.blocks, self.meta, self.xattr, self.uuid) = fields[7:13]
        self.incompat, self.prefix_count, self.prefix_start = fields[14], fields[19], fields[20]
        self.fingerprint_prefix = fields[23]
        assert magic == 0xE0F5E1E2
        assert extensions == 0
        self.block = 1 << self.bits
        assert self.blocks * self.block == len(data)
        self.prefixes = self._prefixes()
        self.by_nid: dict[int, Inode] = {}
        self.names: dict[bytes, Inode] = {}
        self._walk()

    def _prefixes(self) -> list[bytes]:
        at = self.prefix_start * 4
        found = []
        for _ in range(self.prefix_count):
            length, base = struct.unpack_from("<HB", self.data, at)
            found.append(PREFIXES.get(base, b"") + self.data[at + 3 : at + 2 + length])
            at += (2 + length + 3) & -4
        return found

    def _walk(self) -> None:
        pending = [(b"", self.root, self.root, stat.S_IFDIR)]
        while pending:
            path, nid, parent, kind = pending.pop()
            known = nid in self.by_nid
            inode = self.by_nid[nid] if known else self._inode(nid)
            self.by_nid[nid] = self.names[path] = inode
            assert stat.S_IFMT(inode.mode) == kind
            if kind == stat.S_IFDIR:
                assert not known or path == b""
                entries = self._entries(inode.content)
                assert entries.pop(b".") == (nid, kind)
                assert entries.pop(b"..") == (parent, kind)
                for name, (child, child_kind) in entries.items():
                    pending.append((path + b"/" * bool(path) + name, child, nid, child_kind))

    def _entries(self, content: bytes) -> dict[bytes, tuple[int, int]]:
        found: dict[bytes, tuple[int, int]] = {}
        last = b""
        for start in range(0, len(content), self.block):
            block = content[start : start + self.block]
            count = struct.unpack_from("<8xH", block)[0] // 12
            entries = [struct.unpack_from("<QHB", block, 12 * i) for i in range(count)]
            ends = [at for _, at, _ in entries[1:]] + [len(block)]
            for (nid, at, kind), end in zip(entries, ends, strict=True):
                name = block[at:end].rstrip(b"\0")
                assert name
                assert name > last
                last = name
                found[name] = nid, FILE_TYPES[kind]
        return found

    def _inode(self, nid: int) -> Inode:
        at = self.meta * self.block + 32 * nid
        form, xattr_count, mode = struct.unpack_from("<HHH", self.data, at)
        assert form < 16
        if form & 1:
            size, union, number, uid, gid, seconds, ns, links = struct.unpack_from(
                "<QIIIIqII", self.data, at + 8
            )
            end = at + 64
        else:
            links, size, _, union, number, uid, gid = struct.unpack_from(
                "<HIIIIHH", self.data, at + 6
            )
            seconds, ns = self.epoch, self.nsec
            end = at + 32
        xattrs: dict[bytes, bytes] = {}
        hidden: dict[bytes, bytes] = {}
        if xattr_count:
            body_end = end + 12 + 4 * (xattr_count - 1)
            self._xattrs(end, body_end, xattrs, hidden)
            end = body_end
        rdev = (0, 0)
        content, blocks = b"", []
        if stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            content, blocks = self._content(form >> 1, size, union, end)
        elif stat.S_IFMT(mode) in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = (union >> 8 & 0xFFF, union & 0xFF | union >> 12 & 0xFFF00)
        mtime_ns = seconds * 10**9 + ns
        return Inode(
            nid,
            mode,
            links,
            size,
            uid,
            gid,
            mtime_ns,
            rdev,
            number,
            xattrs,
            hidden,
            content,
            blocks,
        )

    def _xattrs(
        self, at: int, end: int, xattrs: dict[bytes, bytes], hidden: dict[bytes, bytes]
    ) -> None:
        shared = self.data[at + 4]
        ids = struct.unpack_from(f"<{shared}I", self.data, at + 12)
        at += 12 + 4 * shared
        places = [self.xattr * self.block + 4 * each for each in ids]
        while at < end:
            places.append(at)
            name_bytes, _, value_bytes = struct.unpack_from("<BBH", self.data, at)
            at += (4 + name_bytes + value_bytes + 3) & -4
        assert at == end
        for place in places:
            name_bytes, index, value_bytes = struct.unpack_from("<BBH", self.data, place)
            name = self.data[place + 4 : place + 4 + name_bytes]
            prefix = self.prefixes[index & 0x7F] if index & 0x80 else PREFIXES[index]
            value_at = place + 4 + name_bytes
            found = hidden if index & 0x80 else xattrs
            assert prefix + name not in found
            found[prefix + name] = self.data[value_at : value_at + value_bytes]

    def _content(
        self, layout: int, size: int, union: int, end: int
    ) -> tuple[bytes, list[tuple[int, int]]]:
        if layout == 4:
            return self._chunks(size, union, end)
        tail = size % self.block if layout == 2 else 0
        start = union * self.block
        plain = self.data[start : start + size - tail]
        assert len(plain) == size - tail
        if tail:
            assert end // self.block == (end + tail - 1) // self.block
        content = plain + self.data[end : end + tail]
        return content, [(start, start + -(-len(plain) // self.block) * self.block)][: bool(plain)]

    def _chunks(self, size: int, union: int, at: int) -> tuple[bytes, list[tuple[int, int]]]:
        assert union < 32
        chunk = self.block << union
        assert size < 1 << 30
        content, blocks, after_hole = bytearray(), [], True
        for number, block in enumerate(struct.unpack_from(f"<{-(-size // chunk)}I", self.data, at)):
            length = min(chunk, size - number * chunk)
            if block == NULL:
                content += bytes(length)
                after_hole = True
                continue
            start = block * self.block
            assert start + length <= len(self.data)
            content += self.data[start : start + length]
            end = start + -(-length // self.block) * self.block
            if not after_hole and blocks[-1][1] == start:
                start = blocks.pop()[0]
            after_hole = False
            blocks.append((start, end))
        return bytes(content), blocks


def with_checksum(data: bytes) -> bytes:
    """The image with its superblock's checksum made right again."""
    block = 1 << data[1024 + 12]
    end = block if block > 1024 else 1024 + block
    value = 0xFFFFFFFF
    for byte in data[1024:1028] + bytes(4) + data[1032:end]:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return data[:1028] + struct.pack("<I", value) + data[1032:]
