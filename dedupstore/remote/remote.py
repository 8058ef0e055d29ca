"""One remote as others use it: names, manifests, indexes and frames, each verified when it is read.

Owns what is asked of `objects` and in which order; `layout` says what the bytes mean. A remote is
trusted with nothing: what it gives has the digest it is known by, or is refused (and another mirror
asked). Thread-safe; nothing is opened before it is needed.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import TypeVar

from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import (
    ChunkDamagedError,
    RemoteConflictError,
    RemoteDamagedError,
    RemoteNotFoundError,
    shown,
)
from dedupstore.frames import Codecs
from dedupstore.remote import layout
from dedupstore.remote.manifests import PackRef, RemoteManifest, decode_manifest, index_spans
from dedupstore.remote.objects import Accept, Found, Objects, Version
from dedupstore.remote.packs import (
    BUNDLE_BYTES_MAX,
    FRAME_SEED,
    INDEX_HEAD_BYTES,
    PACK_BYTES_MAX,
    TRAILER_BYTES,
    PackedFrame,
    PackIndex,
    decode_bundle,
    decode_index,
    decode_indexes,
    decode_trailer,
)
from dedupstore.remote.roots import (
    LINE_BYTES_MAX,
    ROOT_BYTES_MAX,
    Parts,
    Root,
    decode_beginning,
    decode_root,
    encode_root,
)
from dedupstore.remote.workers import Workers

_T = TypeVar("_T")
_R = TypeVar("_R")

# Small objects that are read at a time: what a request waits for is the distance.
PARALLEL = 16
# What need not come may come between indexes of one bundle: a request less pays for it.
_INDEX_GAP_BYTES = 64 << 10
# A pack's index, mostly: one request brings it and the trailer.
_INDEX_BYTES_LIKELY = 128 << 10


class Remote:
    """A remote of a store: its number in place records, its name and its objects."""

    def __init__(self, number: int, name: str, urls: Sequence[str]) -> None:
        self.number = number
        self.name = name
        self.objects = Objects(urls)

    def init(self) -> layout.RemoteInfo:
        """What the remote is; makes one of the place at the first URL if it is none. Raises
        RemoteDamagedError for what is not ours."""
        try:
            return self.info()
        except RemoteNotFoundError:
            if not self.objects.prepare():
                raise
        # The first push would find out too late.
        self.probe()
        info = layout.RemoteInfo(uuid.uuid4(), time.time())
        with suppress(RemoteConflictError):  # another was first
            self.objects.create(layout.INFO_PATH, layout.encode_info(info))
        return self.info()

    def probe(self) -> datetime:
        """The remote's own time, once it has been made sure that it can be written and keeps
        conditions. Raises RemoteError."""
        return self.objects.probe(layout.probe_path(new_salt()))

    def info(self) -> layout.RemoteInfo:
        """What the remote is, by any mirror. Raises RemoteNotFoundError: it is none."""
        try:
            data = self.objects.read(
                layout.INFO_PATH, layout.DOCUMENT_BYTES_MAX, layout.decode_info
            )
        except RemoteNotFoundError:
            raise self._no_remote() from None
        return layout.decode_info(data)

    def info_now(self) -> layout.RemoteInfo:
        """What is at the first URL. Raises RemoteNotFoundError."""
        found = self.objects.read_version(layout.INFO_PATH, layout.DOCUMENT_BYTES_MAX)
        if found is None:
            raise self._no_remote()
        return layout.decode_info(found[0])

    def _no_remote(self) -> RemoteNotFoundError:
        return RemoteNotFoundError(
            f"{self.objects.where}: is no remote (make it one with 'dedupstore remote add')"
        )

    # --- images ---

    def roots(self) -> list[Root]:
        """The first lines of all images' root documents as they are now, in the order of their
        names."""
        found = (root for root in in_parallel(self.beginning, self.root_paths()) if root)
        return sorted(found, key=lambda root: root.name.encode())

    def root_paths(self) -> list[str]:
        """Where the root documents of all images are now."""
        return [one.path for one in self.objects.list(layout.IMAGES) if one.size]

    def beginning(self, path: str) -> Root | None:
        """The first line of a root document as it is now; None: there is no image."""
        with self._of_root():
            return decode_beginning(self.objects.read_beginning(path, LINE_BYTES_MAX), path)

    def root(self, name: str) -> Root:
        """The root document of an image, from any mirror. Raises RemoteNotFoundError."""
        root = self._root(layout.image_path(name))
        if root is None:
            raise self.no_image(name)
        return root

    def ask_root(self, name: str) -> Future[Root]:
        """As `root`, while the caller does something else."""
        worker = Workers(1)
        asked = worker.submit(partial(self.root, name))
        worker.close(0)  # its thread ends with the answer
        return asked

    def no_image(self, name: str) -> RemoteNotFoundError:
        """What to raise for an image that is not there."""
        return RemoteNotFoundError(
            f"remote {shown(self.name)} has no image named {shown(name)} "
            "(see 'dedupstore remote images')"
        )

    def _root(self, path: str) -> Root | None:
        decoded: list[Root | None] = []

        def accept(data: bytes) -> None:
            decoded[:] = [decode_root(data, path)]

        try:
            self.objects.read(path, ROOT_BYTES_MAX, accept)
        except RemoteNotFoundError:
            return None
        return decoded[0]

    def root_version(self, name: str) -> tuple[Root | None, Version | None]:
        """What a name stands for now, None: nothing; and the version of its document, None: there
        is none. Without parts, where only the first line is sound."""
        path = layout.image_path(name)
        found = self.objects.read_version(path, ROOT_BYTES_MAX)
        if found is None:
            return None, None
        data, version = found
        with suppress(RemoteDamagedError):
            return decode_root(data, path), version
        with self._of_root():
            return decode_beginning(data, path), version

    @contextmanager
    def _of_root(self) -> Iterator[None]:
        try:
            yield
        except RemoteDamagedError as error:
            raise RemoteDamagedError(
                f"{self.objects.where}: {error} ('remote delete' takes it away)"
            ) from None

    def put_root(self, root: Root, version: Version | None) -> None:
        """Give an image its name, in the place of this version (None: of nothing). Raises
        RemoteConflictError: somebody else was first."""
        path, data = layout.image_path(root.name), encode_root(root)
        if version is None:
            self.objects.create(path, data)
        else:
            self.objects.replace(path, data, version)

    def delete_root(self, name: str) -> None:
        """Take a name away, whatever state its document is in. Raises RemoteNotFoundError,
        RemoteConflictError."""
        path = layout.image_path(name)
        found = self.objects.read_version(path, ROOT_BYTES_MAX)
        if found is None or not found[0]:
            raise self.no_image(name)
        self.objects.delete_version(path, found[1])

    def is_whole(self, root: Root) -> bool:
        """Whether what belongs to a root document that was read whole is sound. Raises
        RemoteError."""
        if root.manifest_at and root.parts is None:
            return False
        try:
            self.manifest(root)
        except (RemoteNotFoundError, RemoteDamagedError):
            return False
        return True

    def manifest(self, root: Root) -> RemoteManifest:
        """The manifest of an image; it has its id."""
        if root.parts is not None:
            return decode_manifest(root.parts.manifest, root.manifest)
        decoded: list[RemoteManifest] = []

        def accept(data: bytes) -> None:
            decoded[:] = [decode_manifest(data, root.manifest)]

        if root.manifest_at:
            path = layout.image_path(root.name)
            self.objects.read_range(path, root.manifest_at, root.manifest_bytes, accept)
        else:
            self.objects.read(layout.manifest_path(root.manifest), root.manifest_bytes, accept)
        return decoded[0]

    # --- packs ---

    def packs(self) -> dict[bytes, Found]:
        """The packs that are there now, by id, condemned or not."""
        return self._listed(layout.PACKS)

    def bundles(self) -> dict[bytes, Found]:
        """The bundles of indexes that are there now, by id, condemned or not."""
        return self._listed(layout.INDEXES)

    def _listed(self, folder: str) -> dict[bytes, Found]:
        found = ((layout.id_of(one.path), one) for one in self.objects.list(folder))
        return {name: one for name, one in found if name is not None}

    def condemned(self) -> dict[str, tuple[Found, frozenset[str]]]:
        """The condemned documents that are there now, by path, and what each condemns: paths of
        packs, bundles and manifests."""

        def read(found: Found) -> frozenset[str] | None:
            data = self.objects.read_version(found.path, layout.CONDEMNED_BYTES_MAX)
            return None if data is None else layout.decode_condemned(data[0], found.path)

        documents = self.objects.list(layout.CONDEMNED)
        contents = in_parallel(read, documents)
        return {
            found.path: (found, paths)
            for found, paths in zip(documents, contents, strict=True)
            if paths is not None  # deleted since
        }

    def indexes(
        self, manifest: RemoteManifest, parts: Parts | None = None
    ) -> dict[bytes, PackIndex]:
        """The indexes of an image's packs, by id: those that are among the root document's `parts`,
        and the others, of which those that lie together in a bundle come together. A bundle only
        spares requests: what it does not give is read from the packs."""
        found = {} if parts is None else decode_indexes(parts.indexes)
        needed = [ref for ref in manifest.packs if ref.pack not in found]
        if not needed:
            return found
        spans = in_parallel(
            lambda span: self._bundled(*span),
            index_spans(needed, manifest.bundles, _INDEX_GAP_BYTES),
        )
        found |= {index.pack: index for span in spans for index in span}
        others = [ref for ref in manifest.packs if ref.pack not in found]
        return found | {index.pack: index for index in in_parallel(self.index, others)}

    def _bundled(self, bundle: bytes, refs: Sequence[PackRef]) -> list[PackIndex]:
        """Indexes that lie one behind the other, nearly, in a bundle."""
        begin = refs[0].offset
        found: list[PackIndex] = []

        def accept(data: bytes) -> None:
            found.clear()
            for ref in refs:
                index = data[ref.offset - begin : ref.offset - begin + ref.index_bytes]
                found.append(decode_index(index, ref.pack, ref.pack_bytes))

        length = refs[-1].offset + refs[-1].index_bytes - begin
        with suppress(RemoteNotFoundError, RemoteDamagedError):
            self.objects.read_range(layout.bundle_path(bundle), begin, length, accept)
            return found
        return []

    def bundle(self, bundle: bytes, length: int) -> bytes:
        """A bundle of indexes; it has its id."""
        path = layout.bundle_path(bundle)
        if length > BUNDLE_BYTES_MAX:
            raise RemoteDamagedError(f"{path}: has {length} bytes")
        return self.objects.read(path, length, lambda data: decode_bundle(data, bundle))

    def index(self, ref: PackRef) -> PackIndex:
        """The index of one pack; it has the pack's id."""
        return decode_index(self._index_bytes(ref), ref.pack, ref.pack_bytes)

    def _index_bytes(self, ref: PackRef) -> bytes:
        return self.read(
            ref.pack,
            ref.pack_bytes - TRAILER_BYTES - ref.index_bytes,
            ref.index_bytes,
            lambda data: decode_index(data, ref.pack, ref.pack_bytes),
        )

    def listed_index(self, pack: bytes, pack_bytes: int) -> bytes:
        """The index, as it is in the pack, of a pack of which only the length is known."""
        least = INDEX_HEAD_BYTES + TRAILER_BYTES
        if not least <= pack_bytes <= PACK_BYTES_MAX:
            raise RemoteDamagedError(f"pack {pack.hex()[:16]}: has {pack_bytes} bytes")

        def split(tail: bytes) -> tuple[int, bytes]:
            """Length of the index, and as much of it as is here, verified if it is all."""
            trailer = tail[-TRAILER_BYTES:]
            index_bytes = decode_trailer(trailer, pack, pack_bytes)
            index = tail[:-TRAILER_BYTES][-index_bytes:]
            if len(index) == index_bytes:
                decode_index(index, pack, pack_bytes)
            return index_bytes, index

        length = min(_INDEX_BYTES_LIKELY, pack_bytes)
        index_bytes, index = split(self.read(pack, pack_bytes - length, length, split))
        if len(index) == index_bytes:
            return index
        return self._index_bytes(PackRef(pack, pack_bytes, index_bytes))

    def read(self, pack: bytes, offset: int, length: int, accept: Accept | None = None) -> bytes:
        """`length` bytes of a pack. `accept` raises a DedupError when they are wrong."""
        return self.objects.read_range(layout.pack_path(pack), offset, length, accept)

    def has_pack(self, pack: bytes) -> bool:
        """Whether a pack is there."""
        try:
            self.read(pack, 0, 1)
        except RemoteNotFoundError:
            return False
        return True


def open_frame(frame: PackedFrame, record: fmt.Buffer, codecs: Codecs) -> bytes:
    """The raw bytes of a frame that was read from a pack, every chunk of it verified against its
    digest. Raises RemoteDamagedError."""
    if len(record) != frame.length or record[: len(frame.head)] != frame.head:
        raise RemoteDamagedError("a frame does not begin as its pack's index says")
    try:
        raw = codecs.decode(memoryview(record), FRAME_SEED)
    except ChunkDamagedError as error:
        raise RemoteDamagedError(f"a frame {error.reason}") from None
    at, view = 0, memoryview(raw)
    for slot in frame.header.slots:
        if blake3(view[at : at + slot.length]).digest() != slot.digest:
            raise RemoteDamagedError(f"chunk {slot.digest.hex()[:16]} does not have its digest")
        at += slot.length
    return raw


def new_salt() -> bytes:
    """Random bytes that nobody else has."""
    return os.urandom(layout.SALT_BYTES)


def in_parallel(work: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """The result of `work` on each item, in their order, PARALLEL at a time; raises what the first
    that failed raised."""
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="remote")
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)
