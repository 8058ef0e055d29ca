"""Whatever the bytes of an image, a tree comes out or `ErofsError`, for bounded work.

Work is counted in reads, not in seconds, against the bounds that `dedupstore.erofs.inventory`
states. A tree that comes out is well-formed, and its files can be read.
"""

from __future__ import annotations

import os
import struct
import subprocess
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from dedupstore.erofs import read_tree
from dedupstore.erofs.contents import CONTENTS_BYTES_MIN, CONTENTS_PER_IMAGE_BYTE, ImageContent
from dedupstore.erofs.inodes import INODE_SLOT_BYTES, WINDOW_GAP_BYTES
from dedupstore.erofs.metadata import BUDGET_BYTES_MIN, BUDGET_PER_IMAGE_BYTE
from dedupstore.erofs.superblock import BLOCK_BITS_MAX
from dedupstore.erofs.tree import Directory, Node, RegularFile, Symlink
from dedupstore.erofs.xattrs import PREFIXES_BYTES_MAX
from dedupstore.errors import ErofsError
from tests.programs import erofs_programs, unavailable
from tests.property.test_erofs_arbitrary_bytes import CountingReader, spliced

OPTIONS = {
    "default": (),
    "no-tails": ("-Enoinline_data",),
    "chunks": ("--chunksize=4096",),
    "indexes": ("--chunksize=4096", "-Eforce-chunk-indexes"),
    "shared-xattrs": ("-x0",),
    "prefixes": ("--xattr-prefix=user.note.", "--xattr-inode-digest=erofs.fingerprint.v1"),
    "metabox": ("-m4096", "--xattr-prefix=user.note."),
}

unhurried = settings(
    deadline=None,  # the machine may be busy; work is counted instead
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)


def check(image: bytes) -> Directory | None:
    """Read the tree; None when it is refused. Nothing but `ErofsError` may be raised."""
    source = CountingReader(image)
    root = None
    with suppress(ErofsError):
        root = read_tree(source.read_at, len(image))
    inodes = len(image) // INODE_SLOT_BYTES + 3
    block_bytes = 1 << min((image[1036:1037] or b"\0")[0], BLOCK_BITS_MAX)
    budget = max(len(image) * BUDGET_PER_IMAGE_BYTE, BUDGET_BYTES_MIN)
    budget += PREFIXES_BYTES_MAX + 2 * block_bytes
    assert source.bytes_read <= budget + inodes * (WINDOW_GAP_BYTES + block_bytes)
    assert source.calls <= 4 * inodes + budget // 4
    if root is not None:
        assert_well_formed(root, len(image))
    return root


def assert_well_formed(root: Directory, size: int) -> None:
    pending: list[Directory] = [root]
    nodes: dict[int, Node] = {id(root): root}
    while pending:
        for name, node in pending.pop().entries.items():
            assert 0 < len(name) <= 255
            assert name not in (b".", b"..")
            assert not {0, 0x2F} & set(name)
            assert not (isinstance(node, Directory) and id(node) in nodes)
            if isinstance(node, Directory):
                pending.append(node)
            nodes[id(node)] = node
    total = 0
    for node in nodes.values():
        attributes = node.attributes
        assert attributes.permissions == attributes.permissions & 0o7777
        assert -(1 << 63) <= attributes.mtime < 1 << 63
        assert 0 <= attributes.mtime_ns < 1_000_000_000
        assert all(0 < len(n) <= 255 and b"\0" not in n for n in attributes.xattrs)
        assert all(len(value) <= 0xFFFF for value in attributes.xattrs.values())
        if isinstance(node, RegularFile):
            total += assert_readable(node, size)
        elif isinstance(node, Symlink):
            assert 0 < len(node.target) <= 4095
    assert total <= CONTENTS_PER_IMAGE_BYTE * size + CONTENTS_BYTES_MIN


def assert_readable(node: RegularFile, size: int) -> int:
    """Read a little everywhere in a file; return how many bytes of the image it uses."""
    assert isinstance(node.content, ImageContent)
    pieces = node.content.pieces
    assert all(length > 0 and at >= 0 and at + length <= size for _, length, at in pieces)
    assert all(a[0] + a[1] <= b[0] for a, b in pairwise(pieces))
    assert not pieces or pieces[-1][0] + pieces[-1][1] <= node.size < 1 << 63
    assert all(start + length < after for (start, length), (after, _) in pairwise(node.extents))
    total = sum(length for _, length, _ in pieces)
    assert total == sum(length for _, length in node.extents)
    buffer = memoryview(bytearray(100))
    with node.content.opened() as read_into:
        for at in (0, node.size - 1, *(start for start, _, _ in pieces[:50])):
            if 0 <= at < node.size:
                assert 0 < read_into(at, buffer) <= min(100, node.size - at)
        assert read_into(node.size, buffer) == 0
    return total


class Sound:
    """An image of mkfs.erofs, and where its bytes are not zero: there, damage does something."""

    def __init__(self, layout: str, image: bytes) -> None:
        self.layout = layout
        self.image = image
        root = check(image)
        assert root is not None
        contents = set()
        pending: list[Node] = [root]
        while pending:
            node = pending.pop()
            if isinstance(node, Directory):
                pending.extend(node.entries.values())
            elif isinstance(node, RegularFile):
                assert isinstance(node.content, ImageContent)
                for _, length, at in node.content.pieces:
                    contents.update(range(at, at + length))
        used = (at for at in range(1024, len(image)) if image[at] and at not in contents)
        self.metadata = tuple(used)

    def __repr__(self) -> str:  # Hypothesis prints the arguments of a failure
        return f"<image with layout {self.layout!r}>"


@pytest.fixture(scope="module", params=OPTIONS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    directory = tmp_path_factory.mktemp("sound")
    root = directory / "tree"
    (root / "a" / "b").mkdir(parents=True)
    for number in range(60):
        path = root / "a" / f"file-with-a-name-of-some-length-{number:050}"
        path.write_bytes(b"x" * number)
        with suppress(OSError):
            os.setxattr(path, "user.note.many", b"shared")
            os.setxattr(path, "user.note.own", b"%d" % number)
    (root / "a" / "b" / "large").write_bytes(b"".join(b"%d " % n * 3 for n in range(3000)))
    (root / "a" / "c").write_bytes(bytes(range(256)) * 20)
    (root / "a" / "d").hardlink_to(root / "a" / "c")
    (root / "link").symlink_to("a/c")
    with (root / "sparse").open("wb") as sparse:
        sparse.seek(20_000)
        sparse.write(b"data")
        sparse.truncate(50_000)
    target = directory / "image"
    for program in erofs_programs("mkfs.erofs"):
        command = [program, "--quiet", *OPTIONS[request.param], target, root]
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            return Sound(request.param, target.read_bytes())
    unavailable(f"no mkfs.erofs here can {request.param}")


@unhurried
@given(image=st.binary(max_size=4096))
def test_arbitrary_bytes(image: bytes) -> None:
    check(image)


@unhurried
@given(
    superblock=st.binary(min_size=140, max_size=140),
    bits=st.integers(9, 12),
    root=st.integers(0, 400),
    compat=st.sampled_from([0, 0x10, 0x20, 0x3F]),
    features=st.sampled_from([0, 0x4, 0xC, 0x80, 0x180, 0x1FF]),
    rest=st.binary(max_size=12_000),
)
def test_arbitrary_bytes_behind_a_plausible_superblock(
    superblock: bytes, bits: int, root: int, compat: int, features: int, rest: bytes
) -> None:
    image = bytearray(bytes(1024) + b"\xe2\xe1\xf5\xe0" + superblock + rest)
    image[1024 + 12] = bits
    image[1024 + 90] = 0
    struct.pack_into("<I", image, 1024 + 8, compat)
    struct.pack_into("<H", image, 1024 + 14, root)
    struct.pack_into("<I", image, 1024 + 40, root % 3)
    struct.pack_into("<I", image, 1024 + 80, features)
    check(bytes(image))


# Places are drawn without knowledge of the image and folded into it: Hypothesis then sees the same
# choices for every image, and shrinking a failure keeps its meaning.
places = st.integers(0, (1 << 32) - 1)


@unhurried
@given(damage=st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=8))
def test_flipped_bits_of_metadata(sound: Sound, damage: list[tuple[int, int]]) -> None:
    image = bytearray(sound.image)
    for place, bit in damage:
        image[sound.metadata[place % len(sound.metadata)]] ^= 1 << bit
    check(bytes(image))


@unhurried
@given(damage=st.lists(st.tuples(places, st.binary(min_size=1, max_size=8)), max_size=4))
def test_overwritten_metadata(sound: Sound, damage: list[tuple[int, bytes]]) -> None:
    image = bytearray(sound.image)
    for place, data in damage:
        at = sound.metadata[place % len(sound.metadata)]
        image[at : at + len(data)] = data
    check(bytes(image[: len(sound.image)]))


@unhurried
@given(place=places)
def test_truncated_image(sound: Sound, place: int) -> None:
    check(sound.image[: place % len(sound.image)])


@unhurried
@given(splices=st.lists(st.tuples(places, places, st.integers(1, 300)), max_size=4))
def test_metadata_spliced_elsewhere(sound: Sound, splices: list[tuple[int, int, int]]) -> None:
    check(spliced(sound.image, sound.metadata, splices))
