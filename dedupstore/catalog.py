"""Names, manifests and views: what garbage collection starts from.

Owns the rules for names, when a view is of use, and the lookups; every function runs inside the
caller's transaction and is as thread-safe as that.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import lmdb

from dedupstore import format as fmt
from dedupstore.constants import IMAGE_NAME_BYTES_MAX
from dedupstore.env import Environment
from dedupstore.errors import (
    ImageExistsError,
    ImageNotFoundError,
    StoreDamagedError,
    UsageError,
    shown,
)

_T = TypeVar("_T")

_ARCHIVE_SUFFIXES = (".gz", ".xz", ".bz2", ".zst", ".tar", ".tgz", ".txz", ".tbz2", ".tzst")
_IMAGE_SUFFIXES = (".erofs", ".img", ".raw", ".iso", ".ext4", ".squashfs")


def encode_name(name: str) -> bytes:
    """The key of an image name.

    Raises UsageError for a name that is empty, too long, not plain UTF-8 text, or that a shell, a
    path or a glob would misread.
    """
    try:
        key = name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"image name {shown(name)}: not valid UTF-8") from None
    if not key or len(key) > IMAGE_NAME_BYTES_MAX:
        raise UsageError(f"image name {shown(name)}: must have 1 to {IMAGE_NAME_BYTES_MAX} bytes")
    if name in (".", "..") or name.startswith(("-", "/")) or name.endswith("/"):
        raise UsageError(
            f"image name {shown(name)}: must not be '.' or '..', nor begin with '-' or '/'"
        )
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise UsageError(f"image name {shown(name)}: has an empty, '.' or '..' part")
    if any(c in "*?[]\\" or unicodedata.category(c).startswith("C") for c in name):
        raise UsageError(f"image name {shown(name)}: has a control, glob or backslash character")
    return key


def default_name(path: Path) -> str:
    """An image name for a source: its file name without archive and image suffixes."""
    name = path.resolve().name if path.name in ("", ".", "..") else path.name
    for suffixes in (_ARCHIVE_SUFFIXES, _ARCHIVE_SUFFIXES, _IMAGE_SUFFIXES):
        stem, _, suffix = name.rpartition(".")
        if stem and f".{suffix.lower()}" in suffixes:
            name = stem
    if not name:
        raise UsageError(f"{path}: give the image a name")
    return name


def decode_name(key: bytes | memoryview) -> str:
    """The image name of a key."""
    try:
        return bytes(key).decode()
    except UnicodeDecodeError:
        raise StoreDamagedError(f"image name {bytes(key)!r} is not UTF-8") from None


def find_image(txn: lmdb.Transaction, env: Environment, name: str) -> fmt.ImageRecord:
    """What `name` stands for. Raises ImageNotFoundError."""
    try:
        key = encode_name(name)
    except UsageError:
        raise ImageNotFoundError(name) from None
    record = txn.get(key, db=env.images)
    if record is None:
        raise ImageNotFoundError(name)
    return fmt.decode_image(record, key)


def list_images(txn: lmdb.Transaction, env: Environment) -> Iterator[tuple[str, fmt.ImageRecord]]:
    """Every image in the order of its name's bytes."""
    for key, record in txn.cursor(db=env.images):
        name = bytes(key)
        yield decode_name(name), fmt.decode_image(record, name)


def list_names(txn: lmdb.Transaction, env: Environment, prefix: str = "") -> Iterator[str]:
    """The names that begin with `prefix`, in the order of their bytes."""
    start = prefix.encode(errors="surrogatepass")  # no name begins with a surrogate
    cursor = txn.cursor(db=env.images)
    if len(start) <= IMAGE_NAME_BYTES_MAX and cursor.set_range(start):
        for key in cursor.iternext(values=False):
            name = bytes(key)
            if not name.startswith(start):
                return
            yield decode_name(name)


def add_image(txn: lmdb.Transaction, env: Environment, name: str, image: fmt.ImageRecord) -> None:
    """Give an image a name. Raises ImageExistsError."""
    key = encode_name(name)
    if not txn.put(key, fmt.encode_image(image, key), db=env.images, overwrite=False):
        raise ImageExistsError(name)


def remove_image(txn: lmdb.Transaction, env: Environment, name: str) -> fmt.ImageRecord:
    """Forget a name; what it stood for stays until gc. Raises ImageNotFoundError."""
    image = find_image(txn, env, name)
    txn.delete(encode_name(name), db=env.images)
    return image


def forget_name(txn: lmdb.Transaction, env: Environment, name: str) -> None:
    """Forget a name, whatever state its record is in. Raises ImageNotFoundError."""
    try:
        key = encode_name(name)
    except UsageError:
        raise ImageNotFoundError(name) from None
    if not txn.delete(key, db=env.images):
        raise ImageNotFoundError(name)


def manifest_record(txn: lmdb.Transaction, env: Environment, digest: bytes) -> memoryview:
    """The stored manifest of an image digest; dies with the transaction."""
    record = txn.get(digest, db=env.manifests)
    if record is None:
        raise StoreDamagedError(f"{env.path}: manifest {digest.hex()[:16]} is missing")
    return memoryview(record)


def read_manifest(txn: lmdb.Transaction, env: Environment, digest: bytes) -> fmt.ManifestRecord:
    """The manifest of an image digest."""
    return fmt.decode_manifest(manifest_record(txn, env, digest), digest)


def read_summary(txn: lmdb.Transaction, env: Environment, digest: bytes) -> fmt.ManifestRecord:
    """The manifest's counters without its columns."""
    return fmt.decode_manifest_summary(manifest_record(txn, env, digest), digest)


def read_derived(
    txn: lmdb.Transaction, env: Environment, key: bytes, decode: Callable[[fmt.Buffer, bytes], _T]
) -> _T | None:
    """A record of database `meta` that is made anew when it is missing; damaged, it is missing."""
    record = txn.get(key, db=env.meta)
    if record is None:
        return None
    try:
        return decode(record, key)
    except StoreDamagedError:
        return None


def note_feature(txn: lmdb.Transaction, env: Environment, compatible: int) -> None:
    """Say in the superblock that the store has what feature flags stand for."""
    superblock = fmt.decode_superblock(txn.get(fmt.SUPERBLOCK_KEY, db=env.meta) or b"")
    noted = replace(superblock, features_compat=superblock.features_compat | compatible)
    if noted != superblock:
        txn.put(fmt.SUPERBLOCK_KEY, fmt.encode_superblock(noted), db=env.meta)


# --- views ---


def find_view(
    txn: lmdb.Transaction, env: Environment, image: bytes, kind: int
) -> fmt.ViewRecord | None:
    """The view of a kind (fmt.VIEW_*) of an image digest, if it is there, sound and complete."""
    view = read_derived(txn, env, fmt.view_key(image, kind), fmt.decode_view)
    if view is None:
        return None
    needed = (view.digest, *view.homes)
    if all(txn.get(digest, db=env.manifests) is not None for digest in needed):
        return view
    return None


def put_view(
    txn: lmdb.Transaction, env: Environment, image: bytes, kind: int, view: fmt.ViewRecord
) -> None:
    """Record a view, instead of one of the same kind, and that the store has views."""
    key = fmt.view_key(image, kind)
    txn.put(key, fmt.encode_view(view, key), db=env.meta)
    note_feature(txn, env, fmt.FEATURE_COMPAT_VIEWS)


def list_views(
    txn: lmdb.Transaction, env: Environment
) -> Iterator[tuple[bytes, int, fmt.ViewRecord | StoreDamagedError]]:
    """(image digest, kind, record or what is wrong with it) of every view, complete or not."""
    for key, record in txn.cursor(db=env.meta):
        named = fmt.decode_view_key(key)
        if named is not None:
            try:
                yield *named, fmt.decode_view(record, bytes(key))
            except StoreDamagedError as error:
                yield *named, error


def view_digests(txn: lmdb.Transaction, env: Environment, image: bytes) -> Iterator[bytes]:
    """The digests of an image's views, complete or not; damaged ones are passed over."""
    for kind in (fmt.VIEW_KERNEL, fmt.VIEW_POOL):
        view = read_derived(txn, env, fmt.view_key(image, kind), fmt.decode_view)
        if view is not None:
            yield view.digest


def split_views(
    txn: lmdb.Transaction, env: Environment, named: set[bytes]
) -> tuple[list[fmt.ViewRecord], list[bytes]]:
    """The views that mounts may still need, and the keys of the others, given the digests of all
    images with a name.

    A view serves mounts of its image by name, so it ends with the last name; and it ends with any
    of its homes, whose contents it would otherwise keep although their own image is gone. Whatever
    is mounted keeps its manifest by a lease; the next mount derives a new view.
    """
    views: dict[tuple[bytes, int], fmt.ViewRecord] = {}
    keys = []
    for image, kind, view in list_views(txn, env):
        keys.append((image, kind))
        if image in named and isinstance(view, fmt.ViewRecord):
            views[image, kind] = view
    while True:
        homes = {view.digest for (_, kind), view in views.items() if kind == fmt.VIEW_POOL}
        left = {key: view for key, view in views.items() if homes.issuperset(view.homes)}
        if len(left) == len(views):
            return list(left.values()), [fmt.view_key(*key) for key in keys if key not in left]
        views = left
