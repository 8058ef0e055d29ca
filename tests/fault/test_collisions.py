"""Chunks whose XXH3 values are equal stay two chunks, and equal guards give nothing away.

XXH3-64 of more than 240 bytes adds up, for each 64-bit lane of each 64-byte stripe, the product of
the two halves of (lane XOR secret), and adds the lane itself to the neighbouring sum. Where the low
halves agree the product is 0 whatever the high one is; of two such lanes in one 1,024-byte block
one may then be raised as far as the other is lowered. The secret and the seeds are public.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from dedupstore import format as fmt
from dedupstore.check import check_store
from dedupstore.chunker import cut_by_content
from dedupstore.constants import CHUNK_BYTES_MAX
from dedupstore.store import Store
from tests.conftest import import_bytes, noise, opened, read_image, read_range
from tests.interop.corpus import make_erofs

# XXH3's default secret, as far as the first stripes of a block need it.
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b532ea371644897a20df94e3819ef46a9deacd8a8"
)
STRIPE, BLOCK, LANE = 64, 1024, 8
MASK = (1 << 64) - 1


def colliding(data: bytes, at: int = 0, seed: int = 0) -> tuple[bytes, bytes]:
    """Two variants of `data` with the same XXH3-64, which differ in its 1,024-byte block `at`."""
    first = bytearray(data)
    for stripe in (0, 1):
        offset = stripe * LANE  # the secret moves on by a lane with each stripe
        secret = struct.unpack_from("<Q", SECRET, offset)[0]
        key = (secret + (-seed if offset // LANE % 2 else seed)) & MASK
        struct.pack_into("<I", first, at * BLOCK + stripe * STRIPE, key & 0xFFFFFFFF)
    second = bytearray(first)
    for stripe, change in ((0, 0x01234567), (1, -0x01234567)):
        high = at * BLOCK + stripe * STRIPE + 4
        value = struct.unpack_from("<I", second, high)[0]
        struct.pack_into("<I", second, high, (value + change) & 0xFFFFFFFF)
    assert first != second
    assert xxh3_64_intdigest(first, seed) == xxh3_64_intdigest(second, seed), "no collision"
    return bytes(first), bytes(second)


@pytest.mark.parametrize("size", [512, 4096, 8192, 65_536, CHUNK_BYTES_MAX, 100_001])
def test_raw_images_that_collide_are_both_read_back(
    store: Store, tmp_path: Path, size: int
) -> None:
    a, b = colliding(noise(size, size))
    import_bytes(store, tmp_path, "a", a)
    import_bytes(store, tmp_path, "b", b)
    assert read_image(store, "a") == a
    assert read_image(store, "b") == b
    infos = [store.image(name) for name in "ab"]
    assert infos[0].digest != infos[1].digest


def test_whole_chunks_that_collide_are_stored_twice(store: Store, tmp_path: Path) -> None:
    """The same with chunks of which nothing else is shared: each is new."""
    rng = random.Random(7)
    size = 8192
    while True:
        a, b = colliding(rng.randbytes(size))
        if (
            len(list(cut_by_content(memoryview(a))))
            == 1
            == len(list(cut_by_content(memoryview(b))))
        ):
            break
    first = import_bytes(store, tmp_path, "a", a)
    second = import_bytes(store, tmp_path, "b", b)
    assert (first.new_chunks, second.new_chunks) == (1, 1)
    assert (read_image(store, "a"), read_image(store, "b")) == (a, b)


def test_block_that_collides_with_another_in_one_image(store: Store, tmp_path: Path) -> None:
    a, b = colliding(noise(1, 4096), at=2)
    image = a + b + a + b
    import_bytes(store, tmp_path, "image", image)
    assert read_image(store, "image") == image


def test_files_of_an_erofs_image_that_collide_are_both_read_back(
    store: Store, tmp_path: Path
) -> None:
    a, b = colliding(noise(3, 50_000), at=17)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(a)
    (tree / "b").write_bytes(b)
    image = make_erofs(tree, tmp_path / "image.erofs")
    store.import_path(image, "image", lambda _done, _all: None)
    assert read_image(store, "image") == image.read_bytes()


@pytest.mark.damaged
def test_record_forged_to_the_same_guard_is_damage_that_check_finds(
    store: Store, tmp_path: Path
) -> None:
    """Who can write the store can write any guard: equal ones give nothing more. Digests tell."""
    frame = 1
    # The payload begins 52 bytes into the record, 44 into what the guard covers.
    body_at = 16 + 36 - fmt.GUARD_BYTES
    covered, _ = colliding(noise(9, body_at + 8192), at=1, seed=frame)
    image = covered[body_at:]
    if len(list(cut_by_content(memoryview(image)))) != 1:
        pytest.fail("choose another image: this one has several chunks")
    import_bytes(store, tmp_path, "image", image)
    with store.env.write() as txn:
        record = bytes(txn.get(fmt.frame_key(frame), db=store.env.frames))
        assert record[fmt.GUARD_BYTES + body_at :] == image, "stored raw"
        forged = bytearray(record)
        for stripe, change in ((0, 5), (1, -5)):
            high = fmt.GUARD_BYTES + BLOCK + stripe * STRIPE + 4
            value = struct.unpack_from("<I", forged, high)[0]
            struct.pack_into("<I", forged, high, (value + change) & 0xFFFFFFFF)
        fmt.verify_frame(bytes(forged), frame)  # the guard holds
        assert forged != record
        txn.put(fmt.frame_key(frame), bytes(forged), db=store.env.frames)
    with opened(store, "image") as reader:
        assert blake3(read_range(reader, 0, len(image))).digest() != blake3(image).digest()
    store.close()
    (finding,) = check_store(store.path).findings
    assert (finding.what, finding.image) == ("chunk", "image")
