"""Every kind of record of a store, and its keys (`format`, docs/format.md).

The first byte of an input chooses the decoder, and whether the rest is given a guard that holds:
whoever can write the store can do that too. Promises: a record or a DedupError of one line; a frame
within FRAME_RAW_BYTES_LIMIT; what was decoded encodes to what decodes to the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from contextlib import suppress

import zstandard
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from dedupstore import catalog, format as fmt
from dedupstore.errors import DedupError
from tools.fuzzing.messages import check_message

BYTES_MAX = 4096

_DIGEST = blake3(b"chunk").digest()
_NAME = b"base/web-1"
_FRAME = 7
_FILE = fmt.FileState(1, 2, 3, 4, 5)
_VIEW_KEY = fmt.view_key(_DIGEST, fmt.VIEW_POOL)
_ORIGIN_KEY = fmt.origin_key(_FILE)
_REMOTE_KEY = fmt.remote_key("hub")
_decompressor = zstandard.ZstdDecompressor()


def _guard(body: bytes, seed: int = 0) -> bytes:
    return struct.pack("<Q", xxh3_64_intdigest(body, seed)) + body


def _superblock(record: bytes) -> None:
    superblock = fmt.decode_superblock(record)
    assert fmt.decode_superblock(fmt.encode_superblock(superblock)) == superblock
    fmt.check_superblock(superblock, "here")


def _totals(record: bytes) -> None:
    totals = fmt.decode_totals(record)
    assert fmt.decode_totals(fmt.encode_totals(totals)) == totals


def _index(record: bytes) -> None:
    assert fmt.encode_index(_DIGEST, fmt.decode_index(_DIGEST, record)) == record


def _frame(record: bytes) -> None:
    view = memoryview(record)
    fmt.verify_frame(view, _FRAME)
    header = fmt.decode_frame_header(view, _FRAME)
    offsets = fmt.decode_frame_offsets(view, _FRAME)
    raw = fmt.decode_frame_payload(view, _FRAME, _decompressor)
    assert len(raw) == header.raw_bytes <= fmt.FRAME_RAW_BYTES_LIMIT
    assert len(offsets) == len(header.slots) + 1


def _image(record: bytes) -> None:
    image = fmt.decode_image(record, _NAME)
    assert fmt.decode_image(fmt.encode_image(image, _NAME), _NAME) == image


def _view(record: bytes) -> None:
    view = fmt.decode_view(record, _VIEW_KEY)
    assert fmt.encode_view(view, _VIEW_KEY) == record


def _origin(record: bytes) -> None:
    origin = fmt.decode_origin(record, _ORIGIN_KEY)
    again = fmt.decode_origin(fmt.encode_origin(origin), fmt.origin_key(origin.file))
    assert again == origin


def _remote(record: bytes) -> None:
    remote = fmt.decode_remote(record, _REMOTE_KEY)
    assert fmt.decode_remote(fmt.encode_remote(remote, _REMOTE_KEY), _REMOTE_KEY) == remote


def _draft(record: bytes) -> None:
    assert fmt.encode_draft(fmt.decode_draft(record)) == record


def _keys(record: bytes) -> None:
    fmt.decode_view_key(record)
    fmt.draft_session(record)
    name = fmt.decode_remote_key(record)
    assert name is None or fmt.remote_key(name) == record
    if fmt.is_origin_key(record):
        with suppress(DedupError):
            fmt.decode_origin(b"", record)
    for decode in (fmt.decode_frame_key, catalog.decode_name):
        with suppress(DedupError):
            decode(record)


_PLAIN: Callable[[bytes], bytes] = bytes
_DECODERS: tuple[tuple[str, Callable[[bytes], None], Callable[[bytes], bytes]], ...] = (
    ("superblock", _superblock, _guard),
    ("totals", _totals, _guard),
    ("index", _index, lambda b: b[:8] + struct.pack(
        "<I", xxh3_64_intdigest(_DIGEST, int.from_bytes(b[:8], "little")) & 0xFFFFFFFF)),
    ("frame", _frame, lambda b: _guard(b, _FRAME)),
    ("image", _image, lambda b: _guard(b, xxh3_64_intdigest(_NAME))),
    ("view", _view, lambda b: _guard(b, xxh3_64_intdigest(_VIEW_KEY))),
    ("origin", _origin, lambda b: _guard(b, xxh3_64_intdigest(_ORIGIN_KEY))),
    ("draft", _draft, _guard),
    ("keys", _keys, _PLAIN),
    ("remote", _remote, lambda b: _guard(b, xxh3_64_intdigest(_REMOTE_KEY))),
)  # fmt: skip
_AS_IT_IS = 0x80


def run(data: bytes) -> None:
    if not data:
        return
    _, decode, seal = _DECODERS[(data[0] & ~_AS_IT_IS) % len(_DECODERS)]
    try:
        decode(data[1:] if data[0] & _AS_IT_IS else seal(data[1:]))
    except DedupError as error:
        check_message(error)


def seeds() -> Mapping[str, bytes]:
    raw = b"one chunk" * 9 + b"another"
    slots = [fmt.Slot(_DIGEST, 81), fmt.DROPPED, fmt.Slot(_DIGEST, 7)]
    gone = [fmt.Slot(_DIGEST, 0, fmt.SLOT_ABSENT)]
    compressor = zstandard.ZstdCompressor()
    records = {
        "superblock": fmt.encode_superblock(fmt.Superblock(bytes(16), 1)),
        "totals": fmt.encode_totals(fmt.Totals(9, 8, 7, 6, 5)),
        "index": fmt.encode_index(_DIGEST, fmt.make_ref(7, 3)),
        "frame": bytes(fmt.encode_frame(slots, raw, compressor, 16)),
        "image": fmt.encode_image(fmt.ImageRecord(_DIGEST, 5, 6, fmt.KIND_EROFS), _NAME),
        "view": fmt.encode_view(fmt.ViewRecord(_DIGEST, 1, (_DIGEST,), _DIGEST * 2), _VIEW_KEY),
        "origin": fmt.encode_origin(fmt.OriginRecord(_FILE, _DIGEST, fmt.KIND_RAW)),
        "draft": fmt.encode_draft([1, 2, 1 << 60]),
        "keys": _ORIGIN_KEY,
        "remote": fmt.encode_remote(
            fmt.RemoteRecord(5, bytes(range(16)), ("s3://bucket/é", "/mirror")), _REMOTE_KEY
        ),
    }
    found = {}
    for number, (name, _, _) in enumerate(_DECODERS):
        record = records[name]
        body = record if name in ("index", "keys") else record[fmt.GUARD_BYTES :]
        found[name] = bytes((number,)) + body
        found[f"{name}-as-it-is"] = bytes((number | _AS_IT_IS,)) + record
    found["frame-raw"] = b"\x03" + bytes(fmt.encode_frame(gone, b"", compressor, 16))[8:]
    return found
