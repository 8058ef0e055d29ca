"""Names and manifests: databases `images` and `manifests`, the roots of garbage collection.

Owns the rules for names and the lookups; every function runs inside the caller's transaction and is
as thread-safe as that.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import lmdb

from dedupstore import format as fmt
from dedupstore.constants import IMAGE_NAME_BYTES_MAX
from dedupstore.env import Environment
from dedupstore.errors import (
    ImageExistsError,
    ImageNotFoundError,
    StoreDamagedError,
    UsageError,
)


def encode_name(name: str) -> bytes:
    """The key of an image name.

    Raises UsageError for a name that is empty, too long, not plain UTF-8 text, or that a shell, a
    path or a glob would misread.
    """
    try:
        key = name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"image name {name!r}: not valid UTF-8") from None
    if not key or len(key) > IMAGE_NAME_BYTES_MAX:
        raise UsageError(f"image name {name!r}: must have 1 to {IMAGE_NAME_BYTES_MAX} bytes")
    if name in (".", "..") or name.startswith(("-", "/")) or name.endswith("/"):
        raise UsageError(f"image name {name!r}: must not be '.' or '..', nor begin with '-' or '/'")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise UsageError(f"image name {name!r}: has an empty, '.' or '..' part")
    if any(c in "*?[]\\" or unicodedata.category(c).startswith("C") for c in name):
        raise UsageError(f"image name {name!r}: has a control, glob or backslash character")
    return key


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
