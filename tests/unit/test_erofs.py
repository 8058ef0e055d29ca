"""Where file contents lie: against images of mkfs.erofs, and against hand-drawn rare forms.

Set PATH so that a newer mkfs.erofs comes first to run the cases that the distribution's cannot
build (they skip and say so); the hand-drawn images cover the same forms everywhere.
"""

from __future__ import annotations

import os
import random
import re
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from dedupstore.erofs import file_extents, is_erofs, read_superblock
from dedupstore.erofs.metadata import PIECE_BYTES
from dedupstore.erofs.ranges import partition
from dedupstore.errors import ErofsError
from tests.programs import erofs_programs, unavailable

UUID = "01234567-89ab-cdef-0123-456789abcdef"
BLOCK = 4096
ROW = re.compile(r"^ *\d+: +\d+\.\. *\d+ \| +\d+ : +(\d+)\.\. *(\d+) \| +(\d+)", re.MULTILINE)
UNKNOWN_OPTION = re.compile("invalid option|unrecognized option|valid compressor")
FILE_BYTES = {
    "empty": 0,
    "one": 1,
    "tail-only": 4000,
    "block": 4096,
    "block-and-one": 4097,
    "tail": 10_000,
    "middle": 70_000,
    "nested/deeper/large": 300_000,
    "nested/beside": 20_480,
}


def reader(image: bytes) -> Callable[[int, int], bytes]:
    def read_at(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length >= 0
        return image[offset : offset + length]

    return read_at


def extents(image: bytes) -> list[tuple[int, int]]:
    return file_extents(reader(image), len(image))


def assert_well_formed(ranges: list[tuple[int, int]], size: int, block: int = BLOCK) -> None:
    assert all(0 <= start < end <= size for start, end in ranges)
    assert all(left[1] <= right[0] for left, right in pairwise(ranges))
    assert all(not start % block for start, _ in ranges)
    assert all(not end % block or end == size for _, end in ranges)


# --- images of mkfs.erofs ---------------------------------------------------------------------


def text(seed: str, length: int) -> bytes:
    """Compress to about a half, and never repeat a block."""
    source = random.Random(seed)
    return b"".join(b"%08x " % source.getrandbits(32) for _ in range(length // 9 + 1))[:length]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little of everything a file system can hold."""
    root = tmp_path_factory.mktemp("tree")
    for name, length in FILE_BYTES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text(name, length))
    os.link(root / "middle", root / "nested" / "middle-again")
    (root / "short-link").symlink_to("middle")
    (root / "long-link").symlink_to("x/" * 1500)
    with (root / "sparse").open("wb") as sparse:
        sparse.seek(300_000)
        sparse.write(text("sparse", 9_000))
        sparse.truncate(500_000)
    crowd = root / "crowd"
    crowd.mkdir()
    for number in range(300):
        (crowd / f"a-rather-long-name-so-that-the-directory-has-blocks-{number:04}").touch()
    os.mkfifo(root / "fifo")
    if os.geteuid() == 0:
        os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for name in ("tail", "middle"):
        try:
            os.setxattr(root / name, "user.note", b"remember " * 12)
        except OSError:
            break  # the temporary directory knows no xattrs; the hand-drawn images have them
    return root


Build = Callable[..., bytes]


@pytest.fixture
def build(tree: Path, tmp_path: Path) -> Build:
    """Make an image of the tree, with the first mkfs.erofs that knows the options."""

    def make(*options: str, features: int = 0) -> bytes:
        target = tmp_path / "image"
        for program in erofs_programs("mkfs.erofs"):
            command = [program, "--quiet", "-T0", f"-U{UUID}", *options, str(target), str(tree)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                assert UNKNOWN_OPTION.search(done.stderr), done.stderr
                continue
            image = target.read_bytes()
            # Old ones pass over extended options that they do not know.
            if not features & ~read_superblock(reader(image), len(image)).feature_incompat:
                return image
        unavailable(f"no mkfs.erofs here can {' '.join(options)}")

    return make


ZTAILPACKING, FRAGMENTS, WIDE, METABOX = 0x10, 0x20, 0x80, 0x100
UNCOMPRESSED = {
    "inline": ((), 0),
    "plain": (("-Enoinline_data",), 0),
    "extended": (("-Eforce-inode-extended",), 0),
    "small-blocks": (("-b512",), 0),
    "wide": (("-E48bit",), WIDE),
    "dot-omitted": (("-Edot-omitted",), WIDE),
    "metadata-zone": (("--MZ=id",), 0),
    "metabox": (("-m4096",), METABOX),
}
CHUNKED = {
    "map": (("--chunksize=4096", "-Eforce-inode-blockmap"), 4),
    "indexes": (("--chunksize=8192", "-Eforce-chunk-indexes"), 4),
    "large": (("--chunksize=65536",), 4),
}
COMPRESSED = {
    "compact": (("-zlz4hc",), 1),
    "compact-big": (("-zlz4hc", "-C65536"), 3),
    "full": (("-zlz4hc", "-Elegacy-compress"), 0),
    "ztailpacking": (("-zlz4hc", "-Eztailpacking"), ZTAILPACKING),
    "fragments": (("-zlz4hc", "-C65536", "-Efragments"), FRAGMENTS),
    "all-fragments": (("-zlz4hc", "-Eall-fragments"), FRAGMENTS),
    "dedupe": (("-zlz4hc", "-C16384", "-Ededupe,fragments"), FRAGMENTS),
    "lzma": (("-zlzma",), 2),
    "deflate": (("-zdeflate", "-C16384"), 2),
    "zstd": (("-zzstd", "-C65536"), 2),
    "wide-zstd": (("-zzstd", "-C65536", "-E48bit"), WIDE),
    "wide-lz4": (("-zlz4", "-E48bit"), WIDE),
}


@pytest.mark.parametrize("layout", UNCOMPRESSED)
def test_uncompressed_file_is_one_range(layout: str, build: Build) -> None:
    options, features = UNCOMPRESSED[layout]
    image = build(*options, features=features)
    block = read_superblock(reader(image), len(image)).block_bytes
    ranges = extents(image)
    assert_well_formed(ranges, len(image), block)
    held = {image[start:end].rstrip(b"\0") for start, end in ranges}
    for name, length in FILE_BYTES.items():
        content = text(name, length)
        outside_inode = content[: length // block * block]
        assert length < block or content in held or outside_inode in held, name


@pytest.mark.parametrize("layout", CHUNKED)
def test_chunked_file_is_runs_that_hold_its_bytes(layout: str, build: Build) -> None:
    options, features = CHUNKED[layout]
    image = build(*options, features=features)
    ranges = extents(image)
    assert_well_formed(ranges, len(image))
    held = {image[start:end].rstrip(b"\0") for start, end in ranges}
    for name, length in FILE_BYTES.items():
        assert not length or text(name, length) in held, name


def test_sparse_file_has_ranges_only_for_its_data(build: Build) -> None:
    ranges = extents(build("--chunksize=4096", features=4))
    assert sum(end - start for start, end in ranges) < 500_000 + sum(FILE_BYTES.values()) - 400_000


def placements(image: Path, path: str) -> list[tuple[int, int]]:
    """What dump.erofs says of one path: runs of whole blocks, tails in the inode left out."""
    program = erofs_programs("dump.erofs")[-1]  # the newest: it reads what older ones wrote
    command = [program, f"--path=/{path}", "-e", str(image)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    encoded = "Layout: 1" in listing  # only there do contents begin anywhere in a block
    runs: list[tuple[int, int]] = []
    for start, end, length in (map(int, row) for row in ROW.findall(listing)):
        if not length or (start % BLOCK and length < BLOCK and not encoded):
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((start, end))
    return [(start & -BLOCK, -(-end // BLOCK) * BLOCK) for start, end in runs]


@pytest.mark.parametrize("layout", COMPRESSED)
def test_compressed_file_lies_where_dump_erofs_says(
    layout: str, build: Build, tmp_path: Path
) -> None:
    options, features = COMPRESSED[layout]
    image = build(*options, features=features)
    ranges = extents(image)
    assert_well_formed(ranges, len(image))
    edges = {edge for both in ranges for edge in both}
    covered = set(ranges)
    for name in (*FILE_BYTES, "sparse", "crowd", "long-link"):
        for start, end in placements(tmp_path / "image", name):
            assert {start, end} <= edges, name
            if layout != "dedupe":  # there, what files share is cut out of their ranges
                assert (start, end) in covered or layout.startswith("wide"), name


def test_directory_blocks_are_a_range(build: Build) -> None:
    image = build()
    at = image.index(b"a-rather-long-name-so-that-the-directory-has-blocks-0000")
    assert any(start <= at < end for start, end in extents(image))


def test_hard_links_are_visited_once(build: Build) -> None:
    image = build("-Enoinline_data")
    content = text("middle", FILE_BYTES["middle"])
    ranges = extents(image)
    assert sum(image[start:end].rstrip(b"\0") == content for start, end in ranges) == 1


def test_touching_files_stay_separate(build: Build) -> None:
    ranges = extents(build("-Enoinline_data"))
    assert any(left[1] == right[0] for left, right in pairwise(ranges))


def test_only_metadata_is_read(build: Build) -> None:
    image = build("-Enoinline_data")
    wanted: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        wanted.append(length)
        return image[offset : offset + length]

    file_extents(read_at, len(image))
    assert sum(wanted) < 200_000 < len(image) / 2


def test_superblock_tells_identity_and_geometry(build: Build) -> None:
    image = build("-zlz4hc")
    superblock = read_superblock(reader(image), len(image))
    assert superblock.block_bytes == BLOCK == 1 << superblock.block_bits
    assert superblock.blocks * BLOCK == len(image)
    assert superblock.uuid.hex() == UUID.replace("-", "")
    assert superblock.checksum_ok is True
    assert superblock.feature_incompat & 1  # lz4_0padding
    assert superblock.inode_count > len(FILE_BYTES)


def test_checksum_notices_a_flipped_bit(build: Build) -> None:
    image = bytearray(build())
    image[1024 + 48] ^= 1  # in the uuid, which nothing else checks
    assert read_superblock(reader(bytes(image)), len(image)).checksum_ok is False


# --- hand-drawn images -------------------------------------------------------------------------

PLAIN, FULL, INLINE, COMPACT, CHUNKS = range(5)
REGULAR, DIRECTORY, SYMLINK, DEVICE = 0x81A4, 0x41ED, 0xA1FF, 0x21A4
META_BLOCK = 1
HEAD, NONHEAD = 1, 2
FILE = 4  # the nid of the only file, where a test draws only one; the root is nid 1


@dataclass
class Drawing:
    """An image drawn inode by inode; nid n lies 32 n bytes behind the start of block 1."""

    blocks: int = 64
    block_bits: int = 12

    def __post_init__(self) -> None:
        self.data = bytearray(self.blocks << self.block_bits)
        self.superblock()
        self.directory(1, [FILE])

    def superblock(self, **fields: int) -> None:
        """Offsets in the superblock by name; what is not given is zero."""
        offsets = {
            "checksum": (4, "<I"), "compat": (8, "<I"), "bits": (12, "<B"), "slots": (13, "<B"),
            "root": (14, "<H"), "blocks": (36, "<I"), "meta": (40, "<I"), "incompat": (80, "<I"),
            "devices": (86, "<H"), "dirbits": (90, "<B"), "packed": (96, "<Q"),
            "root_long": (112, "<Q"), "metabox": (128, "<Q"),
        }  # fmt: skip
        given = {"bits": self.block_bits, "root": 1, "blocks": self.blocks, "meta": META_BLOCK}
        self.data[1024:1168] = bytes(144)
        struct.pack_into("<I", self.data, 1024, 0xE0F5E1E2)
        for name, value in (given | fields).items():
            offset, form = offsets[name]
            struct.pack_into(form, self.data, 1024 + offset, value)

    def inode(
        self, nid: int, layout: int, size: int, first: int, body: bytes = b"", *,
        mode: int = REGULAR, high: int = 0, extended: bool = False, flags: int = 0,
        xattrs: int = 0, base: int | None = None,
    ) -> None:  # fmt: skip
        at = (META_BLOCK << self.block_bits if base is None else base) + 32 * nid
        form = layout << 1 | extended | flags
        low, top = size & 0xFFFFFFFF, size >> 32
        struct.pack_into("<HHHHIII", self.data, at, form, xattrs, mode, high, low, top, first)
        body_at = at + (64 if extended else 32) + (8 + 4 * xattrs if xattrs else 0)
        self.data[body_at : body_at + len(body)] = body

    def directory(self, nid: int, children: list[int], base: int | None = None) -> None:
        """Draw a directory whose entries lie in its inode."""
        body = self.entries(children)
        self.inode(nid, INLINE, len(body), 0xFFFFFFFF, body, mode=DIRECTORY, base=base)

    @staticmethod
    def entries(children: list[int], kind: int = 0) -> bytes:
        names = len(children) * 12
        return b"".join(
            struct.pack("<QHBB", child, names + index, kind, 0)
            for index, child in enumerate(children)
        ) + b"n" * len(children)

    def extents(self) -> list[tuple[int, int]]:
        found = extents(bytes(self.data))
        assert_well_formed(found, len(self.data), 1 << self.block_bits)
        return [(start >> self.block_bits, end >> self.block_bits) for start, end in found]


def header(low: int = 0, advise: int = 0, algorithms: int = 0, clusterbits: int = 0) -> bytes:
    return struct.pack("<IHBB", low, advise, algorithms, clusterbits)


@pytest.fixture
def drawing() -> Drawing:
    return Drawing()


@pytest.mark.parametrize("block_bits", [9, 12, 14, 16])
def test_every_block_size(block_bits: int) -> None:
    drawing = Drawing(block_bits=block_bits)
    drawing.inode(FILE, PLAIN, (5 << block_bits) + 1, 20)
    assert drawing.extents() == [(20, 26)]


def test_extended_inode_beyond_4_gib_and_32_bit_blocks_is_clipped(drawing: Drawing) -> None:
    drawing.inode(FILE, PLAIN, 1 << 40, 20, extended=True)
    drawing.directory(1, [FILE, 8])
    drawing.inode(8, PLAIN, BLOCK, 3, extended=True, high=1)
    assert drawing.extents() == [(20, 64)]


def test_compact_inode_takes_high_bits_only_when_it_says_so(drawing: Drawing) -> None:
    drawing.directory(1, [FILE, 8])
    drawing.inode(FILE, PLAIN, BLOCK, 20, high=7)  # a link count
    drawing.inode(8, PLAIN, BLOCK, 30, high=7, flags=0x10)  # an address of 48 bits
    assert drawing.extents() == [(20, 21)]


def test_full_flat_inode_keeps_its_last_block_inline(drawing: Drawing) -> None:
    drawing.inode(FILE, INLINE, 3 * BLOCK, 20)
    assert drawing.extents() == [(20, 22)]


def test_hole_has_no_range(drawing: Drawing) -> None:
    drawing.inode(FILE, PLAIN, 3 * BLOCK, 0xFFFFFFFF)
    assert drawing.extents() == []


def test_symlink_blocks_are_a_range_and_devices_have_none(drawing: Drawing) -> None:
    drawing.directory(1, [FILE, 8])
    drawing.inode(FILE, PLAIN, 100, 20, mode=SYMLINK)
    drawing.inode(8, PLAIN, 100, 30, mode=DEVICE)
    assert drawing.extents() == [(20, 21)]


def test_entries_of_types_without_contents_are_not_followed(drawing: Drawing) -> None:
    body = drawing.entries([1 << 50], kind=3)  # a character device, whose inode is not to be read
    drawing.inode(1, INLINE, len(body), 0, body, mode=DIRECTORY)
    assert drawing.extents() == []


def test_chunk_map_joins_neighbours_and_skips_holes(drawing: Drawing) -> None:
    hole = 0xFFFFFFFF
    body = struct.pack("<6I", 20, 22, hole, 24, 30, 40)  # chunks of two blocks, the last of one
    drawing.inode(FILE, CHUNKS, 11 * BLOCK, 1, body)
    assert drawing.extents() == [(20, 24), (24, 26), (30, 32), (40, 41)]


def test_chunk_index_skips_other_devices(drawing: Drawing) -> None:
    drawing.superblock(incompat=0xC, devices=1)
    body = struct.pack("<HHIHHIHHI", 9, 0, 20, 0, 1, 30, 0, 2, 40)
    drawing.inode(FILE, CHUNKS, 3 * BLOCK, 0x20, body)
    assert drawing.extents() == [(20, 21), (40, 41)]  # of device id 2 only bit 0 counts


def test_chunk_index_of_48_bits(drawing: Drawing) -> None:
    drawing.superblock(incompat=0x84)
    body = struct.pack("<HHIHHIHHI", 0, 0, 20, 1, 0, 30, 0xFFFF, 0, 0xFFFFFFFF)
    drawing.inode(FILE, CHUNKS, 3 * BLOCK, 0x60, body)
    assert drawing.extents() == [(20, 21)]


def test_chunk_map_longer_than_one_piece() -> None:
    drawing = Drawing(blocks=600)
    chunks = PIECE_BYTES // 4 + 2
    body = struct.pack("<I", 0xFFFFFFFF) * (chunks - 2) + struct.pack("<2I", 400, 401)
    drawing.inode(FILE, CHUNKS, chunks * BLOCK, 0, body)
    assert drawing.extents() == [(400, 402)]


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("wide_pack", [False, True])
def test_compact_index_gives_first_block(drawing: Drawing, big: bool, wide_pack: bool) -> None:
    # With 24 bytes of xattrs the packs begin on a 32-byte boundary, where packs of 16 may come.
    pack = bytearray(32 if wide_pack else 8)
    struct.pack_into("<I", pack, 0, HEAD << 12)
    struct.pack_into("<I", pack, len(pack) - 4, 20 if big else 19)
    body = header(advise=0x1 | (0x6 if big else 0)) + pack
    drawing.inode(FILE, COMPACT, 20 * BLOCK, 7, body, xattrs=4 if wide_pack else 0)
    assert drawing.extents() == [(20, 27)]


def test_compact_index_cannot_begin_inside_a_cluster(drawing: Drawing) -> None:
    drawing.inode(FILE, COMPACT, 9 * BLOCK, 7, header() + struct.pack("<II", NONHEAD << 12, 19))
    with pytest.raises(ErofsError, match="continues another"):
        drawing.extents()


@pytest.mark.parametrize("layout", [COMPACT, FULL])
def test_file_inside_the_packed_inode_has_no_range(drawing: Drawing, layout: int) -> None:
    drawing.inode(FILE, layout, 9 * BLOCK, 7, header(clusterbits=0x80) + bytes(100))
    assert drawing.extents() == []


def full_index(*clusters: tuple[int, int, int]) -> bytes:
    return bytes(8) + b"".join(struct.pack("<HHI", *cluster) for cluster in clusters)


def test_full_index_counts_big_clusters_and_ignores_the_final_mark(drawing: Drawing) -> None:
    index = full_index(
        (HEAD, 0, 20), (NONHEAD, 0, 0x803), (NONHEAD, 0, 2),
        (HEAD, 0, 23), (NONHEAD, 0, 0x802),
        (HEAD, 100, 0),  # begins behind the end of the file: only marks where the other one ends
    )  # fmt: skip
    drawing.inode(FILE, FULL, 5 * BLOCK + 100, 5, header(advise=2) + index)
    assert drawing.extents() == [(20, 25)]


def test_clusters_shared_by_files_are_cut_out(drawing: Drawing) -> None:
    drawing.directory(1, [4, 8])
    drawing.inode(4, FULL, 3 * BLOCK, 3, header() + full_index((1, 0, 20), (1, 0, 21), (1, 0, 22)))
    drawing.inode(8, FULL, 2 * BLOCK, 1, header() + full_index((1, 0, 30), (1, 0, 21)))
    assert drawing.extents() == [(20, 21), (21, 22), (22, 23), (30, 31)]


@pytest.mark.parametrize(("low", "advise"), [(0, 0x20), (100 << 16, 0x8)])
def test_full_index_leaves_out_a_tail_stored_elsewhere(
    drawing: Drawing, low: int, advise: int
) -> None:
    index = full_index((HEAD, 0, 20), (HEAD, 10, 50))
    drawing.inode(FILE, FULL, 2 * BLOCK, 1, header(low, advise) + index)
    assert drawing.extents() == [(20, 21)]


EXTENTS = {
    4: struct.pack("<QIII", 20 * BLOCK, 5 * BLOCK | 1 << 28, BLOCK - 8, 8),
    8: struct.pack("<6I", BLOCK, 20 * BLOCK, 5 * BLOCK, 21 * BLOCK, 100, 40 * BLOCK + 8),
    16: struct.pack("<IQIIQI", BLOCK, 20 * BLOCK, 0, 9 * BLOCK, 30 * BLOCK, 5),
    32: struct.pack("<IQQ12xIQQ12x", BLOCK, 20 * BLOCK, 0, 100, 30 * BLOCK + 4000, 5),
}
EXPECTED = {
    4: [(20, 26)],
    8: [(20, 26), (40, 41)],
    16: [(20, 21), (30, 39)],
    32: [(20, 21), (30, 32)],
}


@pytest.mark.parametrize("record_bytes", EXTENTS)
def test_encoded_extents_widen_to_whole_blocks(drawing: Drawing, record_bytes: int) -> None:
    advise = 1 | (record_bytes.bit_length() - 3) << 1
    counted = record_bytes > 8
    gap = bytes(-(32 * FILE + 32 + 8) % record_bytes)  # records are aligned to their size
    body = header(2 if counted else 0, advise, 0, 0 if counted else 3) + gap
    drawing.inode(FILE, FULL, 20 * BLOCK, 1, body + EXTENTS[record_bytes])
    assert drawing.extents() == EXPECTED[record_bytes]


def test_last_extent_may_be_a_fragment(drawing: Drawing) -> None:
    drawing.inode(FILE, FULL, 20 * BLOCK, 1, header(2, 0x25) + bytes(8) + EXTENTS[16])
    assert drawing.extents() == [(20, 21)]


def test_packed_inode_is_visited(drawing: Drawing) -> None:
    drawing.superblock(packed=6, incompat=0x20)
    drawing.inode(FILE, PLAIN, BLOCK, 20)
    drawing.inode(6, PLAIN, BLOCK, 30)
    assert drawing.extents() == [(20, 21), (30, 31)]


BOXED = 1 << 63


def test_inodes_in_a_plain_metabox_are_visited(drawing: Drawing) -> None:
    drawing.superblock(incompat=0x180, slots=1, root_long=BOXED | 3, metabox=6)
    drawing.inode(6, PLAIN, 500, 10)
    drawing.directory(3, [BOXED | 5], base=10 * BLOCK)
    drawing.inode(5, PLAIN, BLOCK, 20, base=10 * BLOCK)
    assert drawing.extents() == [(10, 11), (20, 21)]


def test_compressed_metabox_yields_what_lies_outside(drawing: Drawing) -> None:
    drawing.superblock(incompat=0x180, slots=1, root_long=BOXED | 3, metabox=6)
    drawing.inode(6, COMPACT, BLOCK, 2, header() + struct.pack("<II", HEAD << 12, 19))
    assert drawing.extents() == [(20, 22)]


def test_directory_stored_in_chunks_is_followed(drawing: Drawing) -> None:
    body = drawing.entries([9])
    drawing.data[20 * BLOCK : 20 * BLOCK + len(body)] = body
    drawing.inode(1, CHUNKS, BLOCK, 0, struct.pack("<I", 20), mode=DIRECTORY)
    drawing.inode(9, PLAIN, BLOCK, 30)
    assert drawing.extents() == [(20, 21), (30, 31)]


def test_directory_loops_end(drawing: Drawing) -> None:
    drawing.directory(1, [1, 4])
    drawing.directory(4, [4, 1, 1])
    assert drawing.extents() == []


def test_directories_nested_deeper_than_the_recursion_limit(drawing: Drawing) -> None:
    for level in range(2000):
        drawing.directory(1 + 2 * level, [3 + 2 * level])
    drawing.inode(4001, PLAIN, BLOCK, 50)
    assert drawing.extents() == [(50, 51)]


def test_directories_that_share_blocks_exhaust_the_budget(drawing: Drawing) -> None:
    block = drawing.entries(list(range(1, 200))).ljust(BLOCK, b"\0")
    drawing.data[20 * BLOCK : 60 * BLOCK] = block * 40
    for nid in range(1, 200):
        drawing.inode(nid, PLAIN, 40 * BLOCK, 20, mode=DIRECTORY)
    with pytest.raises(ErofsError, match="larger than the image allows"):
        drawing.extents()


def malformed() -> Iterator[tuple[str, Callable[[Drawing], None]]]:
    yield "no EROFS magic", lambda d: struct.pack_into("<I", d.data, 1024, 1)
    yield "unknown incompatible", lambda d: d.superblock(incompat=0x200)
    yield "block size", lambda d: d.superblock(bits=17)
    yield "directory block size", lambda d: d.superblock(dirbits=1)
    yield "metadata begins behind", lambda d: d.superblock(meta=64)
    yield "metabox inode", lambda d: d.superblock(incompat=0x180, metabox=6)
    yield "metabox inode", lambda d: d.superblock(incompat=0x180, slots=1, metabox=BOXED)
    yield "packed inode", lambda d: d.superblock(packed=BOXED)
    yield "unknown inode format", lambda d: d.inode(FILE, PLAIN, 0, 0, flags=0x20)
    yield "unknown inode layout", lambda d: d.inode(FILE, 5, 0, 0)
    yield "unknown file type", lambda d: d.inode(FILE, PLAIN, 0, 0, mode=0)
    yield "unknown chunk format", lambda d: d.inode(FILE, CHUNKS, 1, 0x80)
    yield "behind the end", lambda d: d.inode(FILE, CHUNKS, 1 << 60, 0, extended=True)
    yield "behind the end", lambda d: d.inode(FILE, FULL, 1 << 60, 0, extended=True)
    yield "an inode lies behind", lambda d: d.directory(1, [1 << 40])
    yield "an inode lies behind", lambda d: d.directory(1, [BOXED])
    yield "malformed directory", lambda d: d.inode(1, INLINE, 5, 0, mode=DIRECTORY)
    yield "malformed directory", lambda d: d.inode(1, INLINE, 20, 0, bytes(20), mode=DIRECTORY)
    yield "malformed directory", lambda d: d.inode(1, PLAIN, 20, 0, bytes(20), mode=DIRECTORY)
    yield "behind the end", lambda d: d.inode(1, PLAIN, 20, 64, mode=DIRECTORY)


@pytest.mark.parametrize(("reason", "damage"), list(malformed()))
def test_malformed_image_is_refused(
    reason: str, damage: Callable[[Drawing], None], drawing: Drawing
) -> None:
    damage(drawing)
    with pytest.raises(ErofsError, match=reason):
        drawing.extents()


def test_truncated_image_is_refused(drawing: Drawing) -> None:
    drawing.directory(1, [FILE, 130])
    for length in (0, 1024, 1100, 4096 + 40, 2 * BLOCK):
        with pytest.raises(ErofsError):
            extents(bytes(drawing.data[:length]))


def test_superblock_without_checksum_says_none(drawing: Drawing) -> None:
    assert read_superblock(reader(bytes(drawing.data)), len(drawing.data)).checksum_ok is None


def test_is_erofs_looks_at_the_magic_only(drawing: Drawing) -> None:
    head = bytes(drawing.data[:1028])
    assert is_erofs(head)
    assert not is_erofs(head[:1027])
    assert not is_erofs(bytes(1028))


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], []),
        ([(4, 8), (0, 4)], [(0, 4), (4, 8)]),
        ([(0, 9), (0, 9)], [(0, 9)]),
        ([(0, 9), (3, 6)], [(0, 3), (3, 6), (6, 9)]),
        ([(0, 5), (3, 9), (12, 13)], [(0, 3), (3, 5), (5, 9), (12, 13)]),
        ([(0, 2), (5, 9), (0, 7)], [(0, 2), (2, 5), (5, 7), (7, 9)]),
    ],
)
def test_partition_cuts_at_every_edge(
    ranges: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert partition(ranges) == expected
    assert partition(partition(ranges[:1]) + ranges) == expected
