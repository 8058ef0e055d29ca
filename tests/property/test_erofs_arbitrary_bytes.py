"""Whatever the bytes of an image, the parser answers or refuses, and its work stays bounded.

Work is counted in reads, not in seconds, against the bounds that `dedupstore.erofs.walk` states.
"""

from __future__ import annotations

import struct
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from dedupstore.erofs import file_extents, is_erofs, walk
from dedupstore.erofs.inodes import INODE_SLOT_BYTES, WINDOW_GAP_BYTES
from dedupstore.erofs.metadata import BUDGET_BYTES_MIN, BUDGET_PER_IMAGE_BYTE
from dedupstore.erofs.ranges import partition
from dedupstore.erofs.superblock import BLOCK_BITS_MAX
from dedupstore.errors import ErofsError
from tests.programs import program_path, require_program
from tools.fuzzing import images

OPTIONS = {
    "inline": (),
    "chunks": ("--chunksize=4096",),
    "indexes": ("--chunksize=4096", "-Eforce-chunk-indexes"),
    "compact": ("-zlz4hc", "-C65536"),
    "full": ("-zlz4hc", "-Elegacy-compress"),
}

unhurried = settings(
    deadline=None,  # the machine may be busy; work is counted instead
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)


@dataclass
class CountingReader:
    """An image that counts what is asked of it."""

    image: bytes
    calls: int = 0
    bytes_read: int = field(default=0)

    def read_at(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length >= 0
        data = self.image[offset : offset + length]
        self.calls += 1
        self.bytes_read += len(data)
        return data


def check(image: bytes) -> None:
    """Parse `image`; only a well-formed result or `ErofsError` may come out, for bounded work."""
    source = CountingReader(image)
    size = len(image)
    ranges = []
    with suppress(ErofsError):
        ranges = file_extents(source.read_at, size)
        assert is_erofs(image)
    assert all(0 <= start < end <= size for start, end in ranges)
    assert all(left[1] <= right[0] for left, right in pairwise(ranges))
    block_bytes = 1 << min((image[1036:1037] or b"\0")[0], BLOCK_BITS_MAX)
    assert all(not start % block_bytes for start, _ in ranges)
    assert all(not end % block_bytes or end == size for _, end in ranges)
    inodes = size // INODE_SLOT_BYTES + 3
    budget = max(size * BUDGET_PER_IMAGE_BYTE, BUDGET_BYTES_MIN) + 2 * block_bytes
    assert source.bytes_read <= budget + inodes * (WINDOW_GAP_BYTES + block_bytes)
    assert source.calls <= 4 * inodes + budget // 4


class Sound:
    """An image of mkfs.erofs, and where its metadata lies: there, damage does something."""

    def __init__(self, layout: str, image: bytes, metadata: tuple[int, ...]) -> None:
        self.layout = layout
        self.image = image
        self.metadata = metadata

    def __repr__(self) -> str:  # Hypothesis prints the arguments of a failure
        return f"<image with layout {self.layout!r}>"


@pytest.fixture(scope="module", params=OPTIONS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    require_program("mkfs.erofs")
    directory = tmp_path_factory.mktemp("image")
    root = directory / "root"
    (root / "a" / "b").mkdir(parents=True)
    for number in range(60):
        (root / "a" / f"file-with-a-name-of-some-length-{number:050}").write_bytes(b"x" * number)
    (root / "a" / "b" / "large").write_bytes(b"".join(b"%d " % n * 3 for n in range(9000)))
    (root / "a" / "c").write_bytes(bytes(range(256)) * 20)
    (root / "link").symlink_to("a/c")
    layout = request.param
    return Sound(layout, *build(root, directory / "image", OPTIONS[layout]))


def build(root: Path, target: Path, options: tuple[str, ...]) -> tuple[bytes, tuple[int, ...]]:
    program = program_path("mkfs.erofs") or ""
    command = [program, "--quiet", "-T0", *options, str(target), str(root)]
    subprocess.run(command, check=True, capture_output=True)
    image = target.read_bytes()
    contents = file_extents(CountingReader(image).read_at, len(image))
    edges = [0, *(edge for both in contents for edge in both), len(image)]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    used = [at for start, end in gaps for at in range(start, end) if at >= 1024 and image[at]]
    return image, tuple(used)


@unhurried
@given(image=st.binary(max_size=4096))
def test_arbitrary_bytes(image: bytes) -> None:
    check(image)


@unhurried
@given(
    superblock=st.binary(min_size=140, max_size=140),
    bits=st.integers(9, 12),
    root=st.integers(0, 400),
    features=st.sampled_from([0, 0x4, 0xC, 0x80, 0x180, 0x1FF]),
    rest=st.binary(max_size=12_000),
)
def test_arbitrary_bytes_behind_a_plausible_superblock(
    superblock: bytes, bits: int, root: int, features: int, rest: bytes
) -> None:
    image = bytearray(bytes(1024) + b"\xe2\xe1\xf5\xe0" + superblock + rest)
    image[1024 + 12] = bits
    image[1024 + 90] = 0
    struct.pack_into("<H", image, 1024 + 14, root)
    struct.pack_into("<I", image, 1024 + 40, root % 3)
    struct.pack_into("<I", image, 1024 + 80, features)
    check(bytes(image))


# Places are drawn without knowledge of the image and folded into it: Hypothesis then sees the same
# choices for every image, and shrinking a failure keeps its meaning.
places = st.integers(0, (1 << 32) - 1)


@unhurried
@given(damage=st.lists(st.tuples(places, st.integers(0, 255)), max_size=8))
def test_damaged_metadata(sound: Sound, damage: list[tuple[int, int]]) -> None:
    image = bytearray(sound.image)
    for place, value in damage:
        image[sound.metadata[place % len(sound.metadata)]] = value
    check(bytes(image))


@unhurried
@given(place=places)
def test_truncated_image(sound: Sound, place: int) -> None:
    check(sound.image[: place % len(sound.image)])


def test_stretches_beyond_what_can_be_held_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of gigabytes of ranges fit into a gigabyte of maps of a sparse image."""
    image = images.drawn()["indexes"]
    assert file_extents(CountingReader(image).read_at, len(image))
    monkeypatch.setattr(walk, "RANGES_MIN", 1)
    monkeypatch.setattr(walk, "RANGES_MAX", 1)
    with pytest.raises(ErofsError, match="more stretches"):
        file_extents(CountingReader(image).read_at, len(image))


def spliced(image: bytes, metadata: tuple[int, ...], splices: list[tuple[int, int, int]]) -> bytes:
    """The image with pieces of its metadata copied over others: (from, to, length) each."""
    damaged = bytearray(image)
    for from_place, to_place, length in splices:
        source = metadata[from_place % len(metadata)] & -INODE_SLOT_BYTES
        target = metadata[to_place % len(metadata)] & -INODE_SLOT_BYTES
        damaged[target : target + length] = image[source : source + length]
    return bytes(damaged[: len(image)])


@unhurried
@given(splices=st.lists(st.tuples(places, places, st.integers(1, 300)), max_size=4))
def test_metadata_spliced_elsewhere(sound: Sound, splices: list[tuple[int, int, int]]) -> None:
    check(spliced(sound.image, sound.metadata, splices))


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda r: (r[0], r[0] + r[1])),
        max_size=12,
    ),
    st.integers(0, 12),
)
@settings(deadline=None, database=None)
def test_partition_is_the_coarsest_that_keeps_every_edge(
    ranges: list[tuple[int, int]], split: int
) -> None:
    pieces = partition(ranges)
    covered = {byte for start, end in ranges for byte in range(start, end)}
    assert {byte for start, end in pieces for byte in range(start, end)} == covered
    assert sum(end - start for start, end in pieces) == len(covered)
    assert {edge for both in pieces for edge in both} == {edge for both in ranges for edge in both}
    assert partition(partition(ranges[:split]) + ranges[split:]) == pieces
