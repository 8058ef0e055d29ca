"""Stores of any size, made through the store's own writer from numbers: equal seeds, equal stores.

They are sound (`check` finds nothing), but their chunks are small, so that millions fit on a disk:
what grows with a store is what is kept per chunk, frame, run and image, not the bytes in between.
Real data are kinder: here no chunk compresses, and no two neighbours of an image are neighbours in
the store, so that every chunk is a run of its own.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import lmdb
from blake3 import blake3

from dedupstore import catalog, format as fmt
from dedupstore.constants import FRAME_BYTES_MAX
from dedupstore.env import Environment
from dedupstore.frames import Codecs, FrameWriter, encode_new
from dedupstore.store import Store

# As many as a frame of three Debian roots holds on average; its record then takes a page, as there.
FRAME_CHUNKS = 7
CHUNK_BYTES = 320
IMAGE_CHUNKS = 100_000
# Of an image that stands for a large one: about what chunks of raw images are on average.
_LARGE_CHUNK_BYTES = 24 << 10
_COMMIT_FRAMES = 20_000
_COMMIT_IMAGES = 5_000

# A chunk of a synthetic store: its digest, reference and length in bytes.
Chunk = tuple[bytes, int, int]


def make_store(path: Path, chunks: int) -> None:
    """Create a store of `chunks` chunks in images of IMAGE_CHUNKS or less: chunks-0 and so on."""
    with Store.create(path) as store:
        for number, first in enumerate(range(0, chunks, IMAGE_CHUNKS)):
            wanted = min(IMAGE_CHUNKS, chunks - first)
            add_chunks(store, f"chunks-{number}", wanted, seed=1_000 + number)


def add_chunks(store: Store, name: str, count: int, seed: int) -> None:
    """Add an image of `count` chunks of its own, of CHUNK_BYTES each."""
    made = list(_new_chunks(store.env, count, CHUNK_BYTES, seed))
    made.reverse()  # no slot behind the one before it
    with store.env.write() as txn:
        _put_image(txn, store.env, name, made)


def add_large_image(store: Store, name: str, size: int, distinct: int, seed: int) -> None:
    """Add an image of about `size` bytes: `distinct` chunks, again and again in random order."""
    pool = list(_new_chunks(store.env, distinct, _LARGE_CHUNK_BYTES, seed))
    drawn = random.Random(seed).choices(pool, k=size // _LARGE_CHUNK_BYTES)
    with store.env.write() as txn:
        _put_image(txn, store.env, name, drawn)


def add_small_images(store: Store, first: int, count: int) -> None:
    """Add `count` different images of one chunk, small-`first` and so on."""
    chunks = list(_new_chunks(store.env, count, CHUNK_BYTES, seed=1_000_000 + first))
    for start in range(0, count, _COMMIT_IMAGES):
        with store.env.write() as txn:
            for i, chunk in enumerate(chunks[start : start + _COMMIT_IMAGES], first + start):
                _put_image(txn, store.env, f"small-{i:06}", [chunk])


def add_clones(store: Store, source: str, count: int, prefix: str = "clone-") -> None:
    """Clone an image `count` times in one transaction."""
    with store.env.write() as txn:
        image = catalog.find_image(txn, store.env, source)
        for number in range(count):
            catalog.add_image(txn, store.env, f"{prefix}{number:06}", image)


def _new_chunks(env: Environment, count: int, length: int, seed: int) -> Iterator[Chunk]:
    """Store `count` chunks of noise, full frames, many to a commit; give them out once that is
    done. Each commit's chunks are given out before the next begins."""
    noise = random.Random(seed)
    codecs = Codecs()
    frame_chunks = min(FRAME_CHUNKS, FRAME_BYTES_MAX // length)
    while count > 0:
        made: list[Chunk] = []
        with env.write() as txn:
            writer = FrameWriter(txn, env)
            for _ in range(_COMMIT_FRAMES):
                datas = [noise.randbytes(length) for _ in range(min(frame_chunks, count))]
                slots = tuple(fmt.Slot(blake3(data).digest(), length) for data in datas)
                frame = writer.store(encode_new(codecs, slots, datas))
                made += (
                    (slot.digest, fmt.make_ref(frame, i), length) for i, slot in enumerate(slots)
                )
                count -= len(datas)
                if not count:
                    break
            writer.close()
        yield from made


def _put_image(txn: lmdb.Transaction, env: Environment, name: str, chunks: Sequence[Chunk]) -> None:
    """Add the image that these chunks make, one run each."""
    whole = fmt.ImageDigest()
    for digest, _, length in chunks:
        whole.add(length, digest)
    lengths = array("Q", (length for _, _, length in chunks))
    manifest = fmt.ManifestRecord(
        sum(lengths),
        len(chunks),
        sum({digest: length for digest, _, length in chunks}.values()),
        0,
        lengths,
        array("Q", (ref for _, ref, _ in chunks)),
        array("I", bytes(array("I", [1])) * len(chunks)),
    )
    image = whole.finish()
    txn.put(image, fmt.encode_manifest(manifest, image), db=env.manifests)
    record = fmt.ImageRecord(image, manifest.size, time.time_ns(), fmt.KIND_RAW)
    catalog.add_image(txn, env, name, record)
