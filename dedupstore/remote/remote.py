"""One remote as others use it: names, manifests, indexes and frames, each verified when it is read.

Owns what is asked of `objects` and in which order; `layout` says what the bytes mean. A remote is
trusted with nothing: what it gives has the digest it is known by, or is refused (and another mirror
asked). Thread-safe; nothing is opened before it is needed.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from dedupstore.remote.objects import Accept, Objects, Version

_T = TypeVar("_T")
_R = TypeVar("_R")

# Small objects that are read at a time: what a request waits for is the distance.
PARALLEL = 16


class Remote:
    """A remote of a store: its number in place records, its name and its objects."""

    def __init__(self, number: int, name: str, urls: Sequence[str]) -> None:
        self.number = number
        self.name = name
        self.objects = Objects(urls)

    def init(self) -> layout.RemoteInfo | None:
        """Make a remote of the place at the first URL unless it is one; None if it can only be read
        and so may be none. Raises RemoteDamagedError for what is not ours."""
        if not self.objects.prepare():
            return None
        info = layout.RemoteInfo(uuid.uuid4(), time.time())
        try:
            self.objects.create(layout.INFO_PATH, layout.encode_info(info))
        except RemoteConflictError:
            return self.info()
        return info

    def info(self) -> layout.RemoteInfo:
        """What the remote is. Raises RemoteNotFoundError: it is none."""
        try:
            data = self.objects.read(
                layout.INFO_PATH, layout.DOCUMENT_BYTES_MAX, layout.decode_info
            )
        except RemoteNotFoundError:
            raise RemoteNotFoundError(
                f"{self.objects.where}: is no remote (make it one with 'dedupstore remote add')"
            ) from None
        return layout.decode_info(data)

    # --- images ---

    def roots(self) -> list[layout.Root]:
        """The root documents of all images, in the order of their names."""
        found = [one for one in self.objects.list(layout.IMAGES) if one.size]
        roots = in_parallel(lambda one: self._root(one.path), found)
        return sorted(filter(None, roots), key=lambda root: root.name.encode())

    def root(self, name: str) -> layout.Root:
        """The root document of an image, from any mirror. Raises RemoteNotFoundError."""
        root = self._root(layout.image_path(name))
        if root is None:
            raise self.no_image(name)
        return root

    def no_image(self, name: str) -> RemoteNotFoundError:
        """What to raise for an image that is not there."""
        return RemoteNotFoundError(
            f"remote {shown(self.name)} has no image named {shown(name)} "
            f"(see 'dedupstore remote images')"
        )

    def _root(self, path: str) -> layout.Root | None:
        try:
            data = self.objects.read(
                path, layout.DOCUMENT_BYTES_MAX, lambda data: layout.decode_root(data, path)
            )
        except RemoteNotFoundError:
            return None
        return layout.decode_root(data, path)

    def root_version(self, name: str) -> tuple[layout.Root | None, Version | None]:
        """What a name stands for now, None: nothing; and the version of its document, None: there
        is none."""
        path = layout.image_path(name)
        found = self.objects.read_version(path, layout.DOCUMENT_BYTES_MAX)
        if found is None:
            return None, None
        return layout.decode_root(found[0], path), found[1]

    def put_root(self, root: layout.Root, version: Version | None) -> None:
        """Give an image its name, in the place of this version (None: of nothing). Raises
        RemoteConflictError: somebody else was first."""
        path, data = layout.image_path(root.name), layout.encode_root(root)
        if version is None:
            self.objects.create(path, data)
        else:
            self.objects.replace(path, data, version)

    def delete_root(self, name: str) -> None:
        """Take a name away. Raises RemoteNotFoundError, RemoteConflictError."""
        root, version = self.root_version(name)
        if root is None:
            raise self.no_image(name)
        self.objects.delete_version(layout.image_path(name), version)

    def manifest(self, root: layout.Root) -> layout.RemoteManifest:
        """The manifest of an image; it has its id."""
        path = layout.manifest_path(root.manifest)
        if root.manifest_bytes > layout.MANIFEST_BYTES_MAX:
            raise RemoteDamagedError(f"{path}: claims {root.manifest_bytes} bytes")

        def accept(data: bytes) -> None:
            if blake3(data).digest() != root.manifest:
                raise RemoteDamagedError(f"{path}: does not have its digest")

        data = self.objects.read(path, root.manifest_bytes, accept)
        return layout.decode_manifest(data, root.manifest)

    # --- packs ---

    def indexes(self, packs: Iterable[layout.PackRef]) -> dict[bytes, layout.PackIndex]:
        """The indexes of packs, by id; many are read at a time."""
        found = in_parallel(self.index, packs)
        return {index.pack: index for index in found}

    def index(self, ref: layout.PackRef) -> layout.PackIndex:
        """The index of one pack; it has the pack's id."""
        length = ref.index_bytes
        if not layout.INDEX_HEAD_BYTES <= length <= layout.INDEX_BYTES_MAX:
            raise RemoteDamagedError(f"pack {ref.pack.hex()[:16]}: claims {length} bytes of index")
        data = self.read(
            ref.pack,
            ref.pack_bytes - layout.TRAILER_BYTES - length,
            length,
            lambda data: layout.decode_index(data, ref.pack, ref.pack_bytes),
        )
        return layout.decode_index(data, ref.pack, ref.pack_bytes)

    def read(self, pack: bytes, offset: int, length: int, accept: Accept | None = None) -> bytes:
        """`length` bytes of a pack. `accept` raises a DedupError when they are wrong."""
        return self.objects.read_range(layout.pack_path(pack), offset, length, accept)


def open_frame(frame: layout.PackedFrame, record: fmt.Buffer, codecs: Codecs) -> bytes:
    """The raw bytes of a frame that was read from a pack, every chunk of it verified against its
    digest. Raises RemoteDamagedError."""
    if len(record) != frame.length or record[: len(frame.head)] != frame.head:
        raise RemoteDamagedError("a frame does not begin as its pack's index says")
    try:
        raw = codecs.decode(memoryview(record), layout.FRAME_SEED)
    except ChunkDamagedError as error:
        raise RemoteDamagedError(f"a frame {error.reason}") from None
    at, view = 0, memoryview(raw)
    for slot in frame.header().slots:
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
