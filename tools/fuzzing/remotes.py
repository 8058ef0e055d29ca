"""What a remote gives: documents, packs, manifests and frames (`remote.layout`).

The first byte of an input chooses the decoder. Ids are made to fit, since whoever writes to a
remote chooses them. Promises: a DedupError of one line; or something that encodes to what decodes
to the same; frames that fill their pack, a manifest that covers its image and whose references lead
to its frames; a frame's raw bytes are those that its digests say; and object names that are paths
below their folder, different for different names of images.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping
from itertools import accumulate
from uuid import UUID

import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import DedupError
from dedupstore.frames import Codecs
from dedupstore.remote import layout
from dedupstore.remote.remote import open_frame
from tools.fuzzing.messages import check_message

BYTES_MAX = 4096

_SALT = bytes(16)
_HEADER_BYTES = 72
_U63 = (1 << 63) - 1
_codecs = Codecs()


def _info(data: bytes) -> None:
    info = layout.decode_info(data)
    assert layout.decode_info(layout.encode_info(info)) == info


def _root(data: bytes) -> None:
    """The first half says where it was found."""
    name, _, document = data.partition(b"\0")
    path = layout.image_path(name.decode(errors="replace"))
    root = layout.decode_root(document, path)
    if root is not None:
        assert layout.decode_root(layout.encode_root(root), path) == root
        assert len(root.digest) == len(root.manifest) == 32


def _condemned(data: bytes) -> None:
    paths = layout.decode_condemned(data, "condemned/x")
    assert layout.decode_condemned(layout.encode_condemned(paths), "condemned/x") == paths
    assert all(layout.id_of(path) is not None for path in paths)


def _index(data: bytes) -> None:
    """Two bytes say by how much the pack is longer than its index."""
    more, index = int.from_bytes(data[:2], "little"), data[2:]
    pack = blake3(index).digest()
    trailer = struct.pack("<IHH8s", len(index), 1, 0, b"dedupPCK")
    pack_bytes = len(index) + len(trailer) + more
    assert layout.decode_trailer(trailer, pack, pack_bytes) == len(index)
    decoded = layout.decode_index(index, pack, pack_bytes)
    at = 0
    for frame in decoded.frames:
        assert frame.offset == at
        at += frame.length
        header = frame.header()
        assert sum(slot.length for slot in header.slots) == header.raw_bytes
    assert at == more


def _trailer(data: bytes) -> None:
    length = layout.decode_trailer(data, bytes(32), 1 << 20)
    assert length <= (1 << 20) - layout.TRAILER_BYTES


def _manifest(data: bytes) -> None:
    """A header of 72 bytes, whose magic, version and size are made to fit if its first byte says
    so, and the columns, which are compressed here."""
    header, columns = data[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0"), data[_HEADER_BYTES:]
    if header[0] & 1:
        packs, frames = header[1] & 7, header[2] & 15
        runs = max(0, len(columns) - 40 * packs - 8 * frames) // 20
        columns = columns[: 40 * packs + 8 * frames + 20 * runs].ljust(
            40 * packs + 8 * frames, b"\0"
        )
        at = 40 * packs + 8 * frames
        lengths, steps = (
            struct.unpack_from(f"<{runs}{kind}", columns, at + 8 * runs * i)
            for i, kind in enumerate("Qq")
        )
        counts = struct.unpack_from(f"<{runs}I", columns, at + 16 * runs)
        holes = sum(
            length
            for length, ref, count in zip(lengths, accumulate(steps), counts, strict=True)
            if ref == count == 0
        )
        header = struct.pack(
            "<8sHH16sIIIQQQQ",
            *(b"dedupMAN", 1, 0, _SALT, packs, frames, runs),
            *(sum(lengths) & _U63, sum(counts), 0, holes & _U63),
        )
    record = header + zstandard.compress(columns)
    manifest = layout.decode_manifest(record, blake3(record).digest())
    assert sum(manifest.lengths) == manifest.size
    again = layout.encode_manifest(manifest, _SALT)
    assert layout.decode_manifest(again, blake3(again).digest()) == manifest
    for ref, count in zip(manifest.refs, manifest.counts, strict=True):
        assert (ref == 0) == (count == 0)
        assert ref >> 16 <= len(manifest.frame_packs)
    slots = [[fmt.Slot(bytes(32), 1)]] * len(manifest.frame_packs)
    layout.image_digest(manifest, slots)


def _manifest_as_it_is(data: bytes) -> None:
    layout.decode_manifest(data, blake3(data).digest())


def _frame(data: bytes) -> None:
    """Four bytes say how much of it is the head that the index has."""
    head, record = data[4 : 4 + int.from_bytes(data[:4], "little")], data[4:]
    index = _SALT + struct.pack("<II", 1, len(record)) + head
    pack_bytes = len(record) + len(index) + layout.TRAILER_BYTES
    decoded = layout.decode_index(index, blake3(index).digest(), pack_bytes)
    raw = open_frame(decoded.frames[0], record, _codecs)
    at = 0
    for slot in fmt.decode_frame_header(head, 0).slots:
        assert blake3(raw[at : at + slot.length]).digest() == slot.digest
        at += slot.length
    assert at == len(raw) <= fmt.FRAME_RAW_BYTES_LIMIT


def _names(data: bytes) -> None:
    one, _, other = data.decode(errors="replace").partition("\0")
    paths = [layout.image_path(name) for name in (one, other)]
    assert (paths[0] == paths[1]) == (one == other)
    for path in paths:
        folder, _, name = path.partition("/")
        assert folder == "images"
        assert "/" not in name
        assert name not in (".", "..")
        assert path.isascii()
        assert len(path) <= 250
    assert layout.id_of(one) is None or layout.id_of(one) == bytes.fromhex(one[-64:])


_DECODERS: tuple[tuple[str, Callable[[bytes], None]], ...] = (
    ("info", _info),
    ("root", _root),
    ("condemned", _condemned),
    ("index", _index),
    ("trailer", _trailer),
    ("manifest", _manifest),
    ("manifest-as-it-is", _manifest_as_it_is),
    ("frame", _frame),
    ("names", _names),
)


def run(data: bytes) -> None:
    if not data:
        return
    try:
        _DECODERS[data[0] % len(_DECODERS)][1](data[1:])
    except DedupError as error:
        check_message(error)


def seeds() -> Mapping[str, bytes]:
    chunks = [b"one chunk" * 30, b"another"]
    slots = [fmt.Slot(blake3(chunk).digest(), len(chunk)) for chunk in chunks]
    record = bytearray(fmt.encode_frame(slots, b"".join(chunks), zstandard.ZstdCompressor(), 16))
    fmt.seal_frame(record, layout.FRAME_SEED)
    raw = bytearray(fmt.encode_frame(slots[1:], chunks[1], zstandard.ZstdCompressor(), 16))
    fmt.seal_frame(raw, layout.FRAME_SEED)
    pack = layout.encode_pack([memoryview(record), memoryview(raw)], _SALT)
    end = len(pack.data) - layout.TRAILER_BYTES
    index = pack.data[end - pack.index.index_bytes : end]
    more = len(pack.data) - layout.TRAILER_BYTES - len(index)
    manifest = layout.RemoteManifest(
        *(1377, 5, 284, 1000),
        (layout.PackRef(pack.index.pack, len(pack.data), pack.index.index_bytes),),
        *(array("I", [0, 0]), array("I", [0, 1])),
        *(array("Q", [277, 1000, 7, 7, 86]), array("Q", [1 << 16, 0, 2 << 16, 65537, 1 << 16])),
        array("I", [2, 0, 1, 1, 1]),
    )
    columns = zstandard.decompress(layout.encode_manifest(manifest, _SALT)[_HEADER_BYTES:])
    digest = blake3(b"image").digest()
    root = layout.Root("lib/débian:12", digest, 5, fmt.KIND_EROFS, 1.5, digest, 700)
    head = pack.index.frames[0].head
    found = {
        "info": layout.encode_info(layout.RemoteInfo(UUID(int=5), 3.5)),
        "root": root.name.encode() + b"\0" + layout.encode_root(root),
        "condemned": layout.encode_condemned(
            [layout.pack_path(digest), layout.manifest_path(digest)]
        ),
        "index": more.to_bytes(2, "little") + index,
        "trailer": pack.data[end:],
        "manifest": bytes((1, 1, 2)).ljust(_HEADER_BYTES, b"\0") + columns,
        "manifest-as-it-is": layout.encode_manifest(manifest, _SALT),
        "frame": len(head).to_bytes(4, "little") + bytes(record),
        "names": b"lib/d=C3=A9bian\0lib/d\xc3\xa9bian" + b"/" * 90,
    }
    return {name: bytes((at,)) + found[name] for at, (name, _) in enumerate(_DECODERS)}
