"""What tests do with remotes: push, and read back without any of the code that pulls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from dedupstore import format as fmt
from dedupstore.frames import Codecs
from dedupstore.remote import layout
from dedupstore.remote.collecting import RemoteCollected, collect_remote
from dedupstore.remote.configuration import find_to_change
from dedupstore.remote.indexcache import IndexCache
from dedupstore.remote.pushing import Pushed, push_image, stored_record
from dedupstore.remote.remote import Remote, open_frame
from dedupstore.store import Store
from tests.conftest import silent


def push(
    store: Store,
    remote_name: str,
    name: str,
    *,
    replace: bool = False,
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
        on_progress=silent,
        on_sent=on_sent,
    )


def image_bytes(remote: Remote, name: str) -> bytes:
    """An image's contents, every chunk and the image itself verified against their digests."""
    root = remote.root(name)
    manifest = remote.manifest(root)
    indexes = remote.indexes(manifest.packs)
    frames = list(layout.frames_of(manifest, indexes))
    slots = [frame.header().slots for _, frame in frames]
    assert layout.image_digest(manifest, slots) == root.digest
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


def pack_files(directory: Path) -> list[Path]:
    """The packs of a remote in a directory."""
    return sorted(path for path in (directory / "packs").rglob("*") if path.is_file())


def collect(remote: Remote, seconds: float = 0, *, dry_run: bool = False) -> RemoteCollected:
    """A gc whose grace period is `seconds`."""
    return collect_remote(
        remote, grace_seconds=seconds, dry_run=dry_run, force=True, on_progress=silent
    )
