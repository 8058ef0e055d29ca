"""A remote's objects: their names, and its documents <-> bytes (docs/remote-format.md); those of
images are `roots`.

Pure functions; no I/O, no policy. A remote is not trusted: every decoder here, in `roots`, `packs`
and `manifests` survives any input, raises RemoteDamagedError (one line) for what does not hold, and
bounds what it allocates by constants of its module. Thread-safe.
"""

from __future__ import annotations

import json
import re
import uuid as uuids
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import RemoteDamagedError

FORMAT_VERSION = 1
"""Of documents, but for root documents."""

INFO_PATH = "dedupstore.json"
PACKS = "packs/"
INDEXES = "indexes/"
MANIFESTS = "manifests/"
IMAGES = "images/"
CONDEMNED = "condemned/"
PROBES = "probes/"

SALT_BYTES = 16
"""Random bytes in what is known by its digest: no two writers ever write the same object."""

# What a decoder, or a reader of whole objects, accepts: bounds what a hostile remote makes us
# allocate.
DOCUMENT_BYTES_MAX = 64 << 10
CONDEMNED_BYTES_MAX = 16 << 20
MANIFEST_BYTES_MAX = 512 << 20
IMAGE_BYTES_MAX = 1 << 63

# Names of objects beyond this many characters are replaced by a digest.
_NAME_CHARACTERS_MAX = 200

_CONDEMNABLE = re.compile(
    r"packs/([0-9a-f]{2})/\1[0-9a-f]{62}|(manifests|indexes)/[0-9a-f]{64}", re.ASCII
)
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


# --- object names ---


def pack_path(pack: bytes) -> str:
    """Where the pack with this id is."""
    name = pack.hex()
    return f"{PACKS}{name[:2]}/{name}"


def manifest_path(manifest: bytes) -> str:
    """Where the manifest with this id is."""
    return f"{MANIFESTS}{manifest.hex()}"


def bundle_path(bundle: bytes) -> str:
    """Where the bundle of indexes with this id is."""
    return f"{INDEXES}{bundle.hex()}"


def image_path(name: str) -> str:
    """Where the root document of an image is."""
    key = name.encode()
    written = "".join(chr(byte) if byte in _PLAIN else f"={byte:02X}" for byte in key)
    if written.strip(".") == "":  # no path may be "." or ".."
        written = written.replace(".", "=2E")
    if len(written) > _NAME_CHARACTERS_MAX:
        written = f"={blake3(key).hexdigest()}"
    return IMAGES + written


def condemned_path(salt: bytes) -> str:
    """Where a new condemned document goes."""
    return f"{CONDEMNED}{salt.hex()}"


def probe_path(salt: bytes) -> str:
    """Where a new probe goes."""
    return f"{PROBES}{salt.hex()}"


def id_of(path: str) -> bytes | None:
    """The id of a pack, bundle or manifest by its path; None if the path is of none."""
    if _CONDEMNABLE.fullmatch(path) is None:
        return None
    return bytes.fromhex(path[-2 * fmt.DIGEST_BYTES :])


def is_pack(path: str) -> bool:
    """Whether an object is a pack, by its path."""
    return path.startswith(PACKS) and id_of(path) is not None


# --- documents ---


@dataclass(frozen=True, slots=True)
class RemoteInfo:
    """What a remote is: its UUID and its creation, seconds since 1970."""

    uuid: uuids.UUID
    created: float


def encode_info(info: RemoteInfo) -> bytes:
    """The document `dedupstore.json`."""
    return encode_fields({"uuid": str(info.uuid), "created": info.created})


def decode_info(data: bytes) -> RemoteInfo:
    """Return what a remote is."""
    fields = Fields(data, INFO_PATH)
    try:
        uuid = uuids.UUID(fields.text("uuid"))
    except ValueError:
        raise RemoteDamagedError(f"{INFO_PATH}: no UUID") from None
    return RemoteInfo(uuid, fields.number("created"))


def encode_condemned(paths: Collection[str]) -> bytes:
    """A document that condemns the packs, bundles and manifests at `paths`."""
    return encode_fields({"objects": sorted(paths)})


def decode_condemned(data: bytes, path: str) -> frozenset[str]:
    """The paths that the document found at `path` condemns, all of packs, bundles and
    manifests."""
    found = Fields(data, path).values.get("objects")
    if not isinstance(found, list) or not all(
        isinstance(one, str) and _CONDEMNABLE.fullmatch(one) for one in found
    ):
        raise RemoteDamagedError(f"{path}: condemns what is no pack, bundle or manifest")
    return frozenset(found)


def encode_fields(fields: dict[str, Any], version: int = FORMAT_VERSION) -> bytes:
    """A JSON object of this format version, one line."""
    return json.dumps({"format": version, **fields}, ensure_ascii=False).encode() + b"\n"


class Fields:
    """A JSON object of a known format version, read field by field. Each raises RemoteDamagedError
    for what is missing or wrong."""

    def __init__(self, data: bytes, path: str, version_max: int = FORMAT_VERSION) -> None:
        self._path = path
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise RemoteDamagedError(f"{path}: is no JSON object")
        self.values: dict[str, Any] = values
        self.version = self.integer("format", 1 << 32)
        if self.version > version_max:
            raise RemoteDamagedError(
                f"{path}: has format {self.version}, this release knows up to {version_max} "
                "(use a newer dedupstore)"
            )

    def _wrong(self, name: str) -> RemoteDamagedError:
        return RemoteDamagedError(f"{self._path}: {name} is missing or wrong")

    def text(self, name: str) -> str:
        """A string."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self._wrong(name)
        return value

    def integer(self, name: str, limit: int) -> int:
        """A number from 0 on and below `limit`."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
            raise self._wrong(name)
        return value

    def number(self, name: str) -> float:
        """Seconds since 1970."""
        value = self.values.get(name)
        # A datetime can be made of it.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e11:
            raise self._wrong(name)
        return float(value)

    def digest(self, name: str) -> bytes:
        """A digest in hexadecimal."""
        value = self.text(name)
        if re.fullmatch(r"[0-9a-f]{64}", value) is None:
            raise self._wrong(name)
        return bytes.fromhex(value)
