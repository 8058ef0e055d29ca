"""What tests do with remotes: push, read back without any of the code that pulls, and make what
releases of before did."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace as replaced
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.frames import Codecs, encode_new
from dedupstore.remote import layout
from dedupstore.remote.collecting import RemoteCollected, collect_remote
from dedupstore.remote.configuration import find_to_change
from dedupstore.remote.indexcache import IndexCache
from dedupstore.remote.manifests import RemoteManifest, frames_of, image_digest
from dedupstore.remote.packs import FRAME_SEED
from dedupstore.remote.pushing import Pushed, push_image, stored_record
from dedupstore.remote.remote import Remote, open_frame
from dedupstore.store import Store
from dedupstore.traces import Trace
from tests.conftest import silent


def packed_record(*chunks: bytes) -> bytearray:
    """The record of a frame as it is in a pack."""
    slots = tuple(fmt.Slot(blake3(chunk).digest(), len(chunk)) for chunk in chunks)
    record = encode_new(Codecs(), slots, list(chunks)).record
    fmt.seal_frame(record, FRAME_SEED)
    return record


def push(
    store: Store,
    remote_name: str,
    name: str,
    *,
    replace: bool = False,
    trace: Trace | None = None,
    load: Callable[[int], bytes] | None = None,
    on_sent: Callable[[int, bytes, int, int], None] = lambda *_: None,
) -> Pushed:
    """Push an image as the command does."""
    remote, uuid = find_to_change(store.env, remote_name)
    return push_image(
        store.env,
        store.leases,
        remote,
        IndexCache(store.path, remote, uuid),
        name,
        load=load or partial(stored_record, store.env, store.fetcher),
        replace=replace,
        trace=trace,
        on_progress=silent,
        on_sent=on_sent,
    )


def image_bytes(remote: Remote, name: str) -> bytes:
    """An image's contents, every chunk and the image itself verified against their digests."""
    root = remote.root(name)
    manifest = remote.manifest(root)
    indexes = remote.indexes(manifest)
    frames = list(frames_of(manifest, indexes))
    slots = [frame.header.slots for _, frame in frames]
    assert image_digest(manifest, slots) == root.digest
    assert manifest.size == root.size
    codecs = Codecs()
    raw = [
        open_frame(frame, remote.read(pack, frame.offset, frame.length), codecs)
        for pack, frame in frames
    ]
    parts = []
    for length, ref in zip(manifest.lengths, manifest.refs, strict=True):
        if ref == fmt.REF_HOLE:
            parts.append(bytes(length))
            continue
        at, first = (ref >> fmt.REF_SLOT_BITS) - 1, ref & fmt.REF_SLOT_MASK
        begin = sum(slot.length for slot in slots[at][:first])
        parts.append(raw[at][begin : begin + length])
    return b"".join(parts)


def assert_whole(remote: Remote) -> list[str]:
    """Every image of a remote is all there; return their names."""
    names = [root.name for root in remote.roots()]
    for name in names:
        image_bytes(remote, name)
    return names


def without_bundles(manifest: RemoteManifest) -> bytes:
    """A manifest of version 1, by the byte table of docs/remote-format.md: it knew no bundles."""
    packs, refs = manifest.packs, manifest.refs
    frames, runs = len(manifest.frame_packs), len(refs)
    steps = [ref - before for before, ref in pairwise([0, *refs])]
    columns = b"".join(
        (
            *(ref.pack for ref in packs),
            struct.pack(f"<{len(packs)}I", *(ref.pack_bytes for ref in packs)),
            struct.pack(f"<{len(packs)}I", *(ref.index_bytes for ref in packs)),
            struct.pack(f"<{frames}I", *manifest.frame_packs),
            struct.pack(f"<{frames}I", *manifest.frame_numbers),
            struct.pack(f"<{runs}Q", *manifest.lengths),
            struct.pack(f"<{runs}q", *steps),
            struct.pack(f"<{runs}I", *manifest.counts),
        )
    )
    counters = (manifest.size, manifest.chunks, manifest.unique_bytes, manifest.zero_bytes)
    numbers = (len(packs), frames, runs)
    head = struct.pack(
        "<8sHH16sIIIQQQQ", b"dedupMAN", 1, 0, b"sixteen bytes...", *numbers, *counters
    )
    return head + zstandard.compress(columns)


def make_old(remote: Remote, *, bundles: bool = False) -> None:
    """Leave a remote as releases did whose manifests were objects of their own; and that knew no
    bundles of indexes, unless `bundles`."""
    for name in [root.name for root in remote.roots()]:
        root, version = remote.root_version(name)
        assert root is not None
        if root.parts is None:
            continue
        data = root.parts.manifest if bundles else without_bundles(remote.manifest(root))
        manifest = blake3(data).digest()
        remote.objects.put(layout.manifest_path(manifest), data)
        old = replaced(root, manifest=manifest, manifest_bytes=len(data), parts=None)
        remote.put_root(old, version)
    for bundle in () if bundles else remote.bundles():
        remote.objects.delete(layout.bundle_path(bundle))


def split_root(directory: Path, name: str) -> tuple[dict[str, Any], bytes]:
    """The root document of an image of a remote in a directory: its first line, and the rest."""
    line, rest = (directory / "images" / name).read_bytes().split(b"\n", 1)
    return json.loads(line), rest


def write_root(directory: Path, name: str, document: dict[str, Any], rest: bytes) -> None:
    """Write a root document into a remote in a directory."""
    line = json.dumps(document).encode()
    (directory / "images" / name).write_bytes(line + b"\n" + rest)


def pack_files(directory: Path) -> list[Path]:
    """The packs of a remote in a directory."""
    return sorted(path for path in (directory / "packs").rglob("*") if path.is_file())


def bundle_files(directory: Path) -> list[Path]:
    """The bundles of indexes of a remote in a directory."""
    return sorted((directory / "indexes").glob("*"))


def collect(remote: Remote, seconds: float = 0, *, dry_run: bool = False) -> RemoteCollected:
    """A gc whose grace period is `seconds`."""
    return collect_remote(
        remote, grace_seconds=seconds, dry_run=dry_run, force=True, on_progress=silent
    )
