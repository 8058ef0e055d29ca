"""What a remote gives: documents (`remote.layout`, `remote.roots`), packs and bundles
(`remote.packs`), manifests (`remote.manifests`) and frames.

The first byte of an input chooses the decoder. Ids are made to fit, since whoever writes to a
remote chooses them. Promises: a DedupError of one line; or something that encodes to what decodes
to the same; frames that fill their pack, and indexes that fill their bundle; a manifest that covers
its image, whose references lead to its frames, and whose packs' indexes lie in its bundles; a
frame's raw bytes are those that its digests say; and object names that are paths below their
folder, different for different names of images.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from uuid import UUID

import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import DedupError
from dedupstore.frames import Codecs
from dedupstore.remote import layout, manifests, packs, roots
from dedupstore.remote.remote import open_frame
from tools.fuzzing.messages import check_message

BYTES_MAX = 4096

_SALT = bytes(16)
_HEADER_BYTES = 72
_BUNDLES_BYTES = 4
_BUNDLE_HEADER_BYTES = 32
_BUNDLED_BYTES = 40
_U63 = (1 << 63) - 1
_codecs = Codecs()


def _info(data: bytes) -> None:
    info = layout.decode_info(data)
    assert layout.decode_info(layout.encode_info(info)) == info


def _root(data: bytes) -> None:
    """The first half says where it was found."""
    name, _, document = data.partition(b"\0")
    path = layout.image_path(name.decode(errors="replace"))
    beginning = roots.decode_beginning(document, path)
    root = roots.decode_root(document, path)
    if root is None or beginning is None:
        assert root is beginning
        return
    assert replace(root, parts=None) == beginning
    assert roots.decode_root(roots.encode_root(root), path) == root
    assert len(root.digest) == len(root.manifest) == 32


def _parts(data: bytes) -> None:
    """What follows the first line, under the digest that it has."""
    roots.unpack_trace(data)
    for pack, index in packs.decode_indexes(data).items():
        assert index.pack == pack == blake3(index.encode()).digest()


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
    assert packs.decode_trailer(trailer, pack, pack_bytes) == len(index)
    decoded = packs.decode_index(index, pack, pack_bytes)
    at = 0
    for frame in decoded.frames:
        assert frame.offset == at
        at += frame.length
        header = frame.header
        assert sum(slot.length for slot in header.slots) == header.raw_bytes
    assert at == more


def _trailer(data: bytes) -> None:
    length = packs.decode_trailer(data, bytes(32), 1 << 20)
    assert length <= (1 << 20) - packs.TRAILER_BYTES


def _manifest(data: bytes) -> None:
    """A header of 72 bytes, made to fit if its first byte says so, and the columns, which are
    compressed here. The second byte counts packs and bundles; with any of these it is version 2."""
    header, columns = data[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0"), data[_HEADER_BYTES:]
    if header[0] & 1:
        packed, bundles, frames = header[1] & 7, header[1] >> 3 & 3, header[2] & 15
        at = 36 * bundles + (48 if bundles else 40) * packed + 8 * frames
        runs = max(0, len(columns) - at) // 20
        columns = columns[: at + 20 * runs].ljust(at, b"\0")
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
            *(b"dedupMAN", 2 if bundles else 1, 0, _SALT, packed, frames, runs),
            *(sum(lengths) & _U63, sum(counts), 0, holes & _U63),
        )
        if bundles:
            header += struct.pack("<I", bundles)
    record = header + zstandard.compress(columns)
    manifest = manifests.decode_manifest(record, blake3(record).digest())
    assert sum(manifest.lengths) == manifest.size
    again = manifests.encode_manifest(manifest, _SALT)
    assert manifests.decode_manifest(again, blake3(again).digest()) == manifest
    for ref, count in zip(manifest.refs, manifest.counts, strict=True):
        assert (ref == 0) == (count == 0)
        assert ref >> 16 <= len(manifest.frame_packs)
    _check_spans(manifest)
    slots = [[fmt.Slot(bytes(32), 1)]] * len(manifest.frame_packs)
    manifests.image_digest(manifest, slots)


def _check_spans(manifest: manifests.RemoteManifest) -> None:
    """Each index that is in a bundle is in one span, within its bundle."""
    spanned = []
    for bundle, span in manifests.index_spans(manifest.packs, manifest.bundles, 16):
        number = span[0].bundle
        assert manifest.bundles[number - 1].bundle == bundle
        for ref in span:
            assert ref.bundle == number
            assert ref.offset + ref.index_bytes <= manifest.bundles[number - 1].length
        assert [ref.offset for ref in span] == sorted(ref.offset for ref in span)
        spanned += [ref.pack for ref in span]
    assert sorted(spanned) == sorted(ref.pack for ref in manifest.packs if ref.bundle)


def _manifest_as_it_is(data: bytes) -> None:
    manifests.decode_manifest(data, blake3(data).digest())


def _frame(data: bytes) -> None:
    """Four bytes say how much of it is the head that the index has."""
    head, record = data[4 : 4 + int.from_bytes(data[:4], "little")], data[4:]
    index = _SALT + struct.pack("<II", 1, len(record)) + head
    pack_bytes = len(record) + len(index) + packs.TRAILER_BYTES
    decoded = packs.decode_index(index, blake3(index).digest(), pack_bytes)
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


def _bundle(data: bytes) -> None:
    """A bundle as it is; or, if the first byte says so, one without its header, which is made to
    fit, as is its end."""
    if data[:1] and data[0] & 1:
        count = min(data[0] >> 1, max(0, len(data) - 1) // _BUNDLED_BYTES)
        table = data[1 : 1 + _BUNDLED_BYTES * count]
        data = struct.pack("<8sHH16sI", b"dedupIDX", 1, 0, _SALT, count) + data[1:]
        indexes = sum(length for *_, length in struct.iter_unpack("<32sII", table))
        data = data[: _BUNDLE_HEADER_BYTES + len(table) + indexes]
    entries = packs.decode_bundle(data, blake3(data).digest())
    found = []
    at = _BUNDLE_HEADER_BYTES + _BUNDLED_BYTES * len(entries)
    for entry in entries:
        assert entry.offset == at
        at += entry.index_bytes
        assert entry.index_bytes + packs.TRAILER_BYTES <= entry.pack_bytes
        found.append(packs.decode_index(data[entry.offset : at], entry.pack, entry.pack_bytes))
    assert at == len(data)
    again = packs.encode_bundle(found, data[12:28])
    assert again.data[_BUNDLE_HEADER_BYTES:] == data[_BUNDLE_HEADER_BYTES:]
    assert again.entries == entries


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
    ("bundle", _bundle),
    ("parts", _parts),
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
    fmt.seal_frame(record, packs.FRAME_SEED)
    raw = bytearray(fmt.encode_frame(slots[1:], chunks[1], zstandard.ZstdCompressor(), 16))
    fmt.seal_frame(raw, packs.FRAME_SEED)
    pack = packs.encode_pack([memoryview(record), memoryview(raw)], _SALT)
    other = packs.encode_pack([memoryview(raw)], _SALT)
    bundle = packs.encode_bundle([other.index, pack.index], _SALT)
    end = len(pack.data) - packs.TRAILER_BYTES
    index = pack.data[end - pack.index.index_bytes : end]
    more = len(pack.data) - packs.TRAILER_BYTES - len(index)
    lengths = (len(pack.data), pack.index.index_bytes)
    manifest = manifests.RemoteManifest(
        *(1377, 5, 284, 1000),
        (manifests.BundleRef(bundle.bundle, len(bundle.data)),),
        (manifests.PackRef(pack.index.pack, *lengths, 1, bundle.entries[1].offset),),
        *(array("I", [0, 0]), array("I", [0, 1])),
        *(array("Q", [277, 1000, 7, 7, 86]), array("Q", [1 << 16, 0, 2 << 16, 65537, 1 << 16])),
        array("I", [2, 0, 1, 1, 1]),
    )
    encoded = manifests.encode_manifest(manifest, _SALT)
    columns = zstandard.decompress(encoded[_HEADER_BYTES + _BUNDLES_BYTES :])
    digest = blake3(b"image").digest()
    parts = roots.Parts(b"manifest", b"trace", bundle.data)
    root = roots.Root("lib/débian:12", digest, 5, fmt.KIND_EROFS, 1.5, digest, 8, parts)
    head = pack.index.frames[0].head
    found = {
        "info": layout.encode_info(layout.RemoteInfo(UUID(int=5), 3.5)),
        "root": root.name.encode() + b"\0" + roots.encode_root(root),
        "parts": bundle.data,
        "condemned": layout.encode_condemned(
            [path(digest) for path in (layout.pack_path, layout.bundle_path, layout.manifest_path)]
        ),
        "index": more.to_bytes(2, "little") + index,
        "trailer": pack.data[end:],
        "manifest": bytes((1, 1 | 1 << 3, 2)).ljust(_HEADER_BYTES, b"\0") + columns,
        "manifest-as-it-is": encoded,
        "frame": len(head).to_bytes(4, "little") + bytes(record),
        "names": b"lib/d=C3=A9bian\0lib/d\xc3\xa9bian" + b"/" * 90,
        "bundle": bytes((1 | 2 << 1,)) + bundle.data[_BUNDLE_HEADER_BYTES:],
    }
    return {name: bytes((at,)) + found[name] for at, (name, _) in enumerate(_DECODERS)}
