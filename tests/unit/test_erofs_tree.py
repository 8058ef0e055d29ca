"""A tree out of an EROFS image, one field and one form at a time, on hand-drawn images."""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable

import pytest

from dedupstore.erofs import contents, inventory, metadata, read_tree, xattrs as xattrs_module
from dedupstore.erofs.contents import ImageContent, Piece
from dedupstore.erofs.tree import Attributes, Directory, Node, RegularFile, Special, Symlink
from dedupstore.errors import ErofsError, SourceError

BLOCK = 4096
BLOCKS = 16
ROOT = 40  # nids count 32 bytes
FIRST = 128  # the first child; children lie 512 bytes apart
DATA = 8  # the first block that is free for contents
XATTR_BLOCK = 6
PLAIN, FULL, INLINE, COMPACT, CHUNKS = range(5)
REG, DIR, LNK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK
EPOCH, EPOCH_NS = 1_700_000_000, 123_456_789
FINGERPRINTS, PLAIN_PREFIXES, SHARED_IN_METABOX = 0x20, 0x10, 0x8
DEVICES, METABOX = 0x8, 0x100


def compact(mode: int, size: int = 0, **f: int) -> bytes:
    form = f.get("layout", PLAIN) << 1 | f.get("flag", 0) << 4
    fields = (form, f.get("xattrs", 0), mode, f.get("nb", 1), size, f.get("mtime", 0))
    return struct.pack("<HHHHIIIIHH4x", *fields, f.get("u", 0), 7, f.get("uid", 0), f.get("gid", 0))


def extended(mode: int, size: int = 0, **f: int) -> bytes:
    form = f.get("layout", PLAIN) << 1 | 1
    head = (form, f.get("xattrs", 0), mode, f.get("nb", 0), size, f.get("u", 0), 7)
    owner = (f.get("uid", 0), f.get("gid", 0), f.get("mtime", 0), f.get("ns", 0))
    return struct.pack("<HHHHQIIIIqII16x", *head, *owner, 1)


def dirents(entries: list[tuple[bytes, int]]) -> bytes:
    at = 12 * len(entries)
    head = b""
    for name, nid in entries:
        head += struct.pack("<QHBB", nid, at, 0, 0)
        at += len(name)
    return head + b"".join(name for name, _ in entries)


def directory(entries: list[tuple[bytes, int]]) -> bytes:
    listing = dirents(entries)
    return compact(DIR | 0o755, len(listing), layout=INLINE) + listing


def draw(
    *children: bytes,
    entries: list[tuple[bytes, int]] | None = None,
    at: dict[int, bytes] | None = None,
    **fields: int,
) -> bytes:
    """An image whose root lists the children as a, b, c and so on; `at`: more bytes by offset."""
    image = bytearray(BLOCKS * BLOCK)
    if entries is None:
        entries = [(b"%c" % (97 + i), FIRST + 16 * i) for i in range(len(children))]
    root = directory([(b".", ROOT), (b"..", ROOT), *entries])
    parts = {ROOT * 32: root, **{(FIRST + 16 * i) * 32: c for i, c in enumerate(children)}}
    for offset, data in (parts | (at or {})).items():
        image[offset : offset + len(data)] = data
    head = 1024
    struct.pack_into("<I4xIBBHQqI", image, head, 0xE0F5E1E2, fields.get("compat", 0), 12, 1, ROOT,
                     9, fields.get("epoch", EPOCH), fields.get("epoch_ns", EPOCH_NS))  # fmt: skip
    struct.pack_into("<III", image, head + 36, BLOCKS, 0, fields.get("xattr_block", XATTR_BLOCK))
    struct.pack_into("<I", image, head + 80, fields.get("incompat", 0))
    struct.pack_into("<H", image, head + 86, fields.get("devices", 0))
    struct.pack_into("<B", image, head + 91, fields.get("prefixes", 0))
    struct.pack_into(
        "<IQ", image, head + 92, fields.get("prefix_start", 0), fields.get("packed", 0)
    )
    struct.pack_into("<B", image, head + 105, fields.get("hidden", 0))
    struct.pack_into("<Q", image, head + 128, fields.get("metabox", 0))
    return bytes(image)


def reader(image: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: image[offset : offset + length]


def tree(image: bytes) -> Directory:
    return read_tree(reader(image), len(image))


def only(child: bytes, **more: object) -> Node:
    return tree(draw(child, **more)).entries[b"a"]  # type: ignore[arg-type]


def regular(child: bytes, **more: object) -> RegularFile:
    node = only(child, **more)
    assert isinstance(node, RegularFile)
    return node


def pieces(node: RegularFile) -> tuple[Piece, ...]:
    assert isinstance(node.content, ImageContent)
    return node.content.pieces


def contents_of(node: RegularFile, step: int = 1 << 20) -> bytes:
    found = bytearray(b"\xaa" * node.size)
    at = 0
    with node.content.opened() as read_into:
        while at < node.size:
            got = read_into(at, memoryview(found)[at : at + step])
            assert 0 < got <= step
            at += got
        assert read_into(node.size, memoryview(bytearray(1))) == 0
    return bytes(found)


# --- attributes -------------------------------------------------------------------------------


def test_compact_inode_counts_its_time_from_the_epoch() -> None:
    node = only(compact(REG | 0o6751, mtime=5, uid=65535, gid=3))
    assert node.attributes == Attributes(0o6751, 65535, 3, EPOCH + 5, EPOCH_NS)


def test_extended_inode_has_wide_owners_and_a_signed_time() -> None:
    node = only(extended(REG | 0o600, uid=1 << 31, gid=70_000, mtime=-2, ns=999_999_999))
    assert node.attributes == Attributes(0o600, 1 << 31, 70_000, -2, 999_999_999)


@pytest.mark.parametrize("form", [compact, extended])
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_device_numbers_have_twelve_and_twenty_bits(form: Callable[..., bytes], kind: int) -> None:
    number = 259 << 8 | (70_000 & 0xFF) | (70_000 >> 8) << 20
    node = only(form(kind | 0o640, u=number))
    assert isinstance(node, Special)
    assert (node.kind, node.major, node.minor) == (kind, 259, 70_000)


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK])
def test_fifo_and_socket_have_no_device_number(kind: int) -> None:
    node = only(compact(kind | 0o640, u=0x12345678))
    assert isinstance(node, Special)
    assert (node.kind, node.major, node.minor) == (kind, 0, 0)


def test_symbolic_link_in_its_inode_and_in_a_block() -> None:
    inside = compact(LNK | 0o777, 6, layout=INLINE) + b"target"
    outside = compact(LNK | 0o777, 4095, u=DATA)
    entries = tree(draw(inside, outside, at={DATA * BLOCK: b"x" * 4095})).entries
    targets = [node.target for node in entries.values() if isinstance(node, Symlink)]
    assert targets == [b"target", b"x" * 4095]


def test_names_of_one_inode_are_one_node() -> None:
    image = draw(compact(REG), entries=[(b"one", FIRST), (b"two", FIRST)])
    entries = tree(image).entries
    assert entries[b"one"] is entries[b"two"]


def test_nested_directories_and_several_blocks() -> None:
    blocks = dirents([(b"%0250d" % i, FIRST + 16) for i in range(15)]).ljust(BLOCK, b"\0")
    blocks += dirents([(b"last", FIRST + 16)])
    nested = compact(DIR | 0o700, len(blocks), u=DATA)
    found = tree(draw(nested, compact(REG), at={DATA * BLOCK: blocks})).entries[b"a"]
    assert isinstance(found, Directory)
    assert list(found.entries) == [*(b"%0250d" % i for i in range(15)), b"last"]
    assert len(set(map(id, found.entries.values()))) == 1


def test_depth_costs_neither_recursion_nor_time() -> None:
    depth, step = 20_000, 4
    first = BLOCKS * BLOCK // 32
    image = bytearray(draw(entries=[(b"a", first)]) + bytes(depth * step * 32))
    for nid in range(first, first + depth * step, step):
        inner = [(b"a", nid + step)] if nid + step < first + depth * step else []
        data = directory([(b".", nid), (b"..", nid - step), *inner])
        image[nid * 32 : nid * 32 + len(data)] = data
    node: Node = tree(bytes(image))
    for _ in range(depth):
        assert isinstance(node, Directory)
        node = node.entries[b"a"]
    assert isinstance(node, Directory)
    assert not node.entries


def test_padding_behind_the_last_name_is_no_part_of_it() -> None:
    listing = dirents([(b".", FIRST), (b"name", FIRST + 16)]) + bytes(20)
    found = only(
        compact(DIR, len(listing), layout=INLINE) + listing, at={(FIRST + 16) * 32: compact(REG)}
    )
    assert isinstance(found, Directory)
    assert list(found.entries) == [b"name"]


# --- file contents ----------------------------------------------------------------------------

PATTERN = bytes(i * 7 % 251 for i in range(3 * BLOCK))


def test_plain_file_is_one_piece() -> None:
    node = regular(compact(REG, 2 * BLOCK + 9, u=DATA), at={DATA * BLOCK: PATTERN})
    assert pieces(node) == ((0, 2 * BLOCK + 9, DATA * BLOCK),)
    assert node.extents == ((0, 2 * BLOCK + 9),)
    assert contents_of(node) == contents_of(node, 1000) == PATTERN[: 2 * BLOCK + 9]


def test_inline_tail_is_a_piece_of_its_own() -> None:
    child = compact(REG, BLOCK + 4, u=DATA, layout=INLINE) + b"tail"
    node = regular(child, at={DATA * BLOCK: PATTERN[:BLOCK]})
    assert pieces(node) == ((0, BLOCK, DATA * BLOCK), (BLOCK, 4, FIRST * 32 + 32))
    assert node.extents == ((0, BLOCK + 4),)
    assert contents_of(node) == contents_of(node, 999) == PATTERN[:BLOCK] + b"tail"


def test_small_file_lies_behind_inode_and_xattrs() -> None:
    child = extended(REG, 4, layout=INLINE, xattrs=3) + body(entry(1, b"ab", b"cd")) + b"tail"
    assert pieces(regular(child)) == ((0, 4, FIRST * 32 + 64 + 20),)


@pytest.mark.parametrize(
    "child",
    [
        compact(REG, 9000, u=0xFFFFFFFF),
        compact(REG, 9000, u=0xFFFFFFFF, nb=0xFFFF, flag=1),
        extended(REG, 1 << 60, u=0xFFFFFFFF, nb=0xFFFF),
    ],
)
def test_plain_file_without_blocks_is_a_hole(child: bytes) -> None:
    node = regular(child)
    assert (pieces(node), node.extents) == ((), ())
    buffer = memoryview(bytearray(b"\xaa" * 100))
    with node.content.opened() as read_into:
        assert read_into(8000, buffer) == 100
    assert bytes(buffer) == bytes(100)


def test_high_half_of_a_block_address_counts() -> None:
    with pytest.raises(ErofsError, match="behind the image's end"):
        regular(extended(REG, 9, u=0xFFFFFFFF))  # 16 TiB from the start, and no hole
    with pytest.raises(ErofsError, match="behind the image's end"):
        regular(compact(REG, 9, u=DATA, nb=1, flag=1))


CHUNK_MAP = [DATA, DATA + 1, 0xFFFFFFFF, DATA + 2, DATA + 4]
CHUNK_PIECES = (
    (0, 2 * BLOCK, DATA * BLOCK),
    (3 * BLOCK, BLOCK, (DATA + 2) * BLOCK),
    (4 * BLOCK, 5, (DATA + 4) * BLOCK),
)


def index(block: int, device: int = 0) -> bytes:
    return struct.pack("<HHI", block >> 32, device, block & 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("form", "table"),
    [
        (0, struct.pack("<5I", *CHUNK_MAP)),
        (0x20, b"".join(map(index, CHUNK_MAP))),
        (0x60, b"".join(index(b if b < 99 else 0xFFFFFFFFFFFF) for b in CHUNK_MAP)),
    ],
)
def test_chunks_that_touch_are_one_piece_and_holes_are_absent(form: int, table: bytes) -> None:
    child = compact(REG, 4 * BLOCK + 5, layout=CHUNKS, u=form) + table
    node = regular(child, at={DATA * BLOCK: b"\1" * 5 * BLOCK})
    assert pieces(node) == CHUNK_PIECES
    assert node.extents == ((0, 2 * BLOCK), (3 * BLOCK, BLOCK + 5))
    expected = b"\1" * 2 * BLOCK + bytes(BLOCK) + b"\1" * (BLOCK + 5)
    assert contents_of(node) == contents_of(node, 1777) == expected


def test_chunks_of_several_blocks() -> None:
    child = compact(REG, 9 * BLOCK, layout=CHUNKS, u=2) + struct.pack("<3I", 8, 0xFFFFFFFF, 3)
    assert pieces(regular(child)) == ((0, 4 * BLOCK, 8 * BLOCK), (8 * BLOCK, BLOCK, 3 * BLOCK))


def test_hole_at_the_end_has_no_piece() -> None:
    child = compact(REG, 9999, layout=CHUNKS) + struct.pack("<3I", DATA, 0xFFFFFFFF, 0xFFFFFFFF)
    assert pieces(regular(child)) == ((0, BLOCK, DATA * BLOCK),)


def test_hole_may_name_any_device_but_data_must_be_here() -> None:
    def child(block: int) -> bytes:
        return compact(REG, BLOCK, layout=CHUNKS, u=0x20) + index(block, device=1)

    assert pieces(regular(child(0xFFFFFFFF), incompat=DEVICES, devices=1)) == ()
    assert pieces(regular(child(DATA))) == ((0, BLOCK, DATA * BLOCK),)  # the bits mean nothing
    with pytest.raises(ErofsError, match="another device"):
        regular(child(DATA), incompat=DEVICES, devices=1)


def test_image_that_became_shorter_is_a_source_error() -> None:
    image = draw(compact(REG, BLOCK, u=DATA))
    length = len(image)
    node = read_tree(lambda at, n: image[:length][at : at + n], len(image)).entries[b"a"]
    assert isinstance(node, RegularFile)
    length = DATA * BLOCK
    with node.content.opened() as read_into, pytest.raises(SourceError, match="ends"):
        read_into(0, memoryview(bytearray(10)))


# --- extended attributes ----------------------------------------------------------------------


def entry(index: int, name: bytes, value: bytes) -> bytes:
    raw = struct.pack("<BBH", len(name), index, len(value)) + name + value
    return raw + bytes(-len(raw) % 4)


def body(*entries: bytes, shared: tuple[int, ...] = ()) -> bytes:
    ids = struct.pack(f"<{len(shared)}I", *shared)
    return struct.pack("<4xB7x", len(shared)) + ids + b"".join(entries)


def with_xattrs(raw: bytes) -> bytes:
    return compact(REG, xattrs=(len(raw) - 12) // 4 + 1) + raw


def xattrs(raw: bytes, **more: object) -> dict[bytes, bytes]:
    return dict(only(with_xattrs(raw), **more).attributes.xattrs)


def prefixes(*pairs: tuple[int, bytes]) -> bytes:
    raw = b""
    for base, infix in pairs:
        raw += struct.pack("<HB", len(infix) + 1, base) + infix
        raw += bytes(-len(raw) % 4)
    return raw


def test_every_short_prefix_has_its_name() -> None:
    raw = body(
        entry(1, b"a", b"1"),
        entry(2, b"", b"22"),
        entry(3, b"", b"333"),
        entry(4, b"overlay.opaque", b"y"),
        entry(6, b"capability", b"\1\0\0\2" * 5),
    )
    assert xattrs(raw) == {
        b"user.a": b"1",
        b"system.posix_acl_access": b"22",
        b"system.posix_acl_default": b"333",
        b"trusted.overlay.opaque": b"y",
        b"security.capability": b"\1\0\0\2" * 5,
    }


def test_shared_attributes_come_from_their_area_and_inline_ones_win() -> None:
    area = entry(1, b"a", b"shared") + entry(6, b"selinux", b"x" * 5000) + entry(1, b"c", b"3")
    second = len(entry(1, b"a", b"shared")) // 4
    third = second + len(entry(6, b"selinux", b"x" * 5000)) // 4
    raw = body(entry(1, b"a", b"inline"), shared=(0, second, third))
    found = xattrs(raw, at={XATTR_BLOCK * BLOCK: area})
    assert found == {b"user.a": b"inline", b"security.selinux": b"x" * 5000, b"user.c": b"3"}


def test_long_prefixes_in_the_image_and_in_the_packed_inode() -> None:
    table = prefixes((1, b"comment."), (4, b"overlay."))
    raw = body(entry(0x80, b"x", b"1"), entry(0x81, b"opaque", b"y"), entry(0x80, b"", b"2"))
    expected = {b"user.comment.x": b"1", b"trusted.overlay.opaque": b"y", b"user.comment.": b"2"}
    start = DATA * BLOCK + 8
    assert xattrs(raw, at={start: table}, prefixes=2, prefix_start=start // 4) == expected
    packed = 200
    inode = compact(REG, 8 + len(table), layout=INLINE) + bytes(8) + table
    more = {"prefixes": 2, "prefix_start": 2, "packed": packed, "at": {packed * 32: inode}}
    assert xattrs(raw, **more) == expected
    more["at"] = {8: table}
    assert xattrs(raw, compat=PLAIN_PREFIXES, **more) == expected


def test_fingerprint_of_the_image_is_dropped_in_every_form() -> None:
    table = prefixes((4, b"x."), (4, b"digest"), (0, b"erofs.hidden"))
    raw = body(
        entry(0x81, b"", b"d" * 32),
        entry(4, b"digest", b"d" * 32),
        entry(0x81, b"-of-someone", b"kept"),
        entry(0x82, b"", b"hidden"),
    )
    more = {"at": {DATA * BLOCK: table}, "prefixes": 3, "prefix_start": DATA * BLOCK // 4}
    kept = {b"trusted.digest-of-someone": b"kept"}
    assert xattrs(raw, compat=FINGERPRINTS, hidden=1, **more) == kept
    shown = xattrs(raw, hidden=1, **more)  # without the feature the byte means nothing
    assert shown == kept | {b"trusted.digest": b"d" * 32}


def test_what_the_kernel_has_no_prefix_for_is_hidden() -> None:
    raw = body(entry(5, b"lustre", b"1"), entry(0x83, b"none", b"2"), entry(0, b"", b""))
    assert xattrs(raw) == {}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (body(), "malformed extended"),
        (body(b"\0\0\0\0")[:4] + b"\2" + body(b"\0\0\0\0")[5:], "malformed extended"),
        (body(entry(1, b"abcd", b"")[:4]), "reaches behind"),
        (body(entry(1, b"a", b"1" * 9)[:8]), "reaches behind"),
        (body(entry(1, b"", b"1")), "impossible name"),
        (body(entry(2, b"a", b"1")), "impossible name"),
        (body(entry(1, b"a\0b", b"1")), "impossible name"),
        (body(entry(1, b"a" * 251, b"1")), "impossible name"),
        (body(shared=((BLOCKS - XATTR_BLOCK) * BLOCK // 4,)), "behind the end"),
        (body(shared=(0xFFFFFFFF,)), "behind the end"),
    ],
)
def test_malformed_attributes_are_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(ErofsError, match=reason):
        xattrs(raw)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prefixes": 1, "prefix_start": 16}, "malformed prefix"),
        ({"prefixes": 1, "prefix_start": 0xFFFFFFFF}, "malformed prefix"),
        ({"prefixes": 1, "packed": FIRST, "prefix_start": 9}, "malformed prefix"),
        ({"prefixes": 1, "packed": 1 << 40}, "behind the end"),
        ({"compat": FINGERPRINTS}, "digests without a name"),
        ({"compat": SHARED_IN_METABOX}, "metabox"),
    ],
)
def test_impossible_prefixes_are_refused(fields: dict[str, int], reason: str) -> None:
    with pytest.raises(ErofsError, match=reason):
        tree(draw(compact(REG, 3, layout=INLINE) + b"abc", **fields))


# --- refusals ---------------------------------------------------------------------------------

LOOP = [(b".", FIRST), (b"..", FIRST)]


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        (compact(REG, 9, layout=FULL), "compressed file contents"),
        (compact(REG, 9, layout=COMPACT), "compressed file contents"),
        (compact(DIR, 9, layout=FULL), "compressed file contents"),
        (compact(LNK, 9, layout=COMPACT), "compressed file contents"),
        (compact(REG, 9, layout=5), "unknown inode layout"),
        (compact(0), "unknown file type"),
        (compact(0x3000), "unknown file type"),
        (b"\x20" + compact(REG)[1:], "unknown inode format"),
        (extended(REG, ns=1_000_000_000), "impossible time"),
        (extended(REG, 1 << 63), "a file of"),
        (compact(REG, 9, u=BLOCKS), "behind the image's end"),
        (compact(REG, (BLOCKS - DATA) * BLOCK + 1, u=DATA), "behind the image's end"),
        (compact(REG, BLOCK + 1, u=BLOCKS, layout=INLINE), "behind the image's end"),
        (compact(REG, 9, layout=CHUNKS, u=0x80), "unknown chunk format"),
        (compact(REG, 9, layout=CHUNKS) + b"\x10\0\0\0", "behind the image's end"),
        (extended(REG, 1 << 62, layout=CHUNKS), "behind the end|larger than the image allows"),
        (compact(LNK), "symbolic link of 0"),
        (compact(LNK, 4096, u=DATA), "symbolic link of 4096"),
        (compact(LNK, 3, layout=INLINE) + b"a\0b", "zero byte"),
        (compact(LNK, 3, u=0xFFFFFFFF), "hole"),
        (compact(DIR, 1 << 31, u=0xFFFFFFFF), "hole"),
        (compact(DIR, 3 * BLOCK, u=DATA), "malformed directory"),
        (directory([*LOOP, (b"", FIRST)]), "name of 0 bytes"),
        (directory([(b"x" * 256, FIRST), (b"y", FIRST)]), "name of 256 bytes"),
        (directory([(b"a/b", FIRST)]), "slash"),
        (directory([(b"a\0b", FIRST), (b"c", FIRST)]), "zero byte"),
        (directory([*LOOP, (b".", FIRST)]), "twice"),
        (directory([*LOOP, (b"..", FIRST)]), "twice"),
        (directory([(b"x", FIRST + 16), (b"x", FIRST + 16)]), "a name twice"),
        (directory([(b"self", FIRST)]), "second name"),
        (directory([(b"root", ROOT)]), "second name"),
        (directory([(b"far", 1 << 20)]), "behind the end"),
        (directory([(b"boxed", 1 << 63 | 4)]), "metabox"),
    ],
)
def test_impossible_inode_is_refused(child: bytes, reason: str) -> None:
    with pytest.raises(ErofsError, match=reason):
        tree(draw(child, at={(FIRST + 16) * 32: compact(REG)}))


def test_directory_with_two_names_is_refused() -> None:
    with pytest.raises(ErofsError, match="second name"):
        tree(draw(directory(LOOP), entries=[(b"a", FIRST), (b"b", FIRST)]))


def test_root_must_be_a_directory() -> None:
    with pytest.raises(ErofsError, match="root"):
        tree(draw(at={ROOT * 32: compact(REG)}))


@pytest.mark.parametrize(
    "fields", [{"epoch_ns": 1_000_000_000}, {"epoch": (1 << 63) - 1}], ids=["ns", "overflow"]
)
def test_impossible_epoch_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ErofsError, match="impossible time"):
        tree(draw(compact(REG, mtime=1), **fields))


def test_extended_inode_at_the_end_of_the_image_is_refused() -> None:
    last = BLOCKS * BLOCK // 32 - 1
    image = draw(entries=[(b"a", last)], at={last * 32: extended(REG)[:32]})
    with pytest.raises(ErofsError, match="inside an inode"):
        tree(image)


def test_compressed_metabox_is_refused_when_it_is_needed() -> None:
    box = compact(REG, 64, layout=FULL)
    more = {"incompat": METABOX, "metabox": FIRST}
    assert not tree(draw(box, entries=[], **more)).entries
    with pytest.raises(ErofsError, match="metabox"):
        tree(draw(box, entries=[(b"a", 1 << 63)], **more))


def test_metabox_holds_inodes_with_their_tails_and_shared_attributes() -> None:
    raw = body(shared=(64,))
    boxed = compact(REG, 4, layout=INLINE, xattrs=(len(raw) - 12) // 4 + 1) + raw + b"tail"
    box = boxed.ljust(256, b"\0") + entry(1, b"a", b"1")
    more = {"incompat": METABOX, "metabox": FIRST, "compat": SHARED_IN_METABOX, "xattr_block": 0}
    more["at"] = {DATA * BLOCK: box}
    holder = compact(REG, len(box), u=DATA)
    image = draw(holder, entries=[(b"a", 1 << 63)], **more)  # type: ignore[arg-type]
    node = tree(image).entries[b"a"]
    assert isinstance(node, RegularFile)
    assert node.attributes.xattrs == {b"user.a": b"1"}
    assert pieces(node) == ((0, 4, DATA * BLOCK + 32 + len(raw)),)
    assert contents_of(node) == b"tail"


def test_more_contents_than_64_images_are_refused() -> None:
    def child(chunks: int) -> bytes:
        return compact(REG, chunks * BLOCK, layout=CHUNKS) + struct.pack("<I", DATA) * chunks

    enough = 64 * BLOCKS + (1 << 20) // BLOCK
    node = regular(child(enough))
    assert sum(length for _, length, _ in pieces(node)) == enough * BLOCK
    with pytest.raises(ErofsError, match="more file contents than"):
        regular(child(enough + 1))


def test_more_pieces_than_the_image_has_room_for_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def child(chunks: int) -> bytes:
        return compact(REG, chunks * BLOCK, layout=CHUNKS) + struct.pack("<I", DATA) * chunks

    monkeypatch.setattr(contents, "PIECES_MIN", 0)
    assert len(pieces(regular(child(BLOCKS * BLOCK // 512)))) == BLOCKS * BLOCK // 512
    with pytest.raises(ErofsError, match="more pieces"):
        regular(child(BLOCKS * BLOCK // 512 + 1))


def test_more_names_than_permitted_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image = draw(compact(REG), entries=[(b"a", FIRST), (b"b", FIRST)])
    monkeypatch.setattr(inventory, "NAMES_MAX", 2)
    assert len(tree(image).entries) == 2
    monkeypatch.setattr(inventory, "NAMES_MAX", 1)
    with pytest.raises(ErofsError, match="more names"):
        tree(image)


def test_contents_are_bounded_by_the_data_of_a_sparse_image() -> None:
    image = draw(compact(REG, 8 * BLOCK, u=DATA))
    assert read_tree(reader(image), len(image), BLOCK).entries
    huge = draw(compact(REG, (1 << 20) + 64 * BLOCK + 1, u=DATA))
    sparse = huge + bytes(2 << 20)
    assert read_tree(reader(sparse), len(sparse)).entries
    with pytest.raises(ErofsError, match="more file contents than"):
        read_tree(reader(sparse), len(sparse), BLOCK)


def test_shared_attributes_that_overlap_are_charged_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "BUDGET_PER_IMAGE_BYTE", 1)
    area = struct.pack("<BBH", 1, 1, 0x2000) * 2048
    raw = body(shared=tuple(range(20)))
    image = draw(with_xattrs(raw), at={XATTR_BLOCK * BLOCK: area})
    with pytest.raises(ErofsError, match="larger than the image allows"):
        tree(image)


def test_more_attributes_than_the_image_has_room_for_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = body(entry(1, b"a", b""), entry(1, b"b", b""))
    monkeypatch.setattr(xattrs_module, "ATTRIBUTES_MAX", 2)
    assert len(xattrs(raw)) == 2
    monkeypatch.setattr(xattrs_module, "ATTRIBUTES_MAX", 1)
    with pytest.raises(ErofsError, match="more extended attributes"):
        xattrs(raw)
