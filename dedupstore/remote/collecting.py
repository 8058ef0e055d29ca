"""Garbage of a remote: what no image needs is condemned, and deleted a grace period later.

Owns the order of looking and deleting that lets any number of pushes, and other gcs, go on
meanwhile (docs/remote-format.md, "gc"). Trusts no clock but the remote's own. What it cannot read,
a root document or a manifest, makes it stop before it changes anything. One gc belongs to one
thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from dedupstore.errors import (
    RemoteDamagedError,
    RemoteError,
    RemoteNotFoundError,
    UsageError,
    shown,
)
from dedupstore.remote import layout
from dedupstore.remote.objects import Found
from dedupstore.remote.remote import Remote, in_parallel, new_salt

# Between its last look at what is condemned and its root document a push takes seconds.
GRACE_SECONDS_MIN = 600
GRACE_SECONDS = 24 * 3600
# Objects that one condemned document names: it stays far below layout.CONDEMNED_BYTES_MAX.
_OBJECTS_MAX = 50_000
_DELETES_AT_ONCE = 256
assert _OBJECTS_MAX * 100 < layout.CONDEMNED_BYTES_MAX


@dataclass(frozen=True, slots=True)
class RemoteCollected:
    """What a gc did, or with `dry_run` would have done. `young` objects are needed by no image, but
    are younger than the grace period: a push may be about to need them. `condemned` are those that
    a gc after the grace period deletes."""

    dry_run: bool
    images: int
    packs: int
    bytes: int
    young: int
    condemned: int
    condemned_bytes: int
    deleted: int
    deleted_bytes: int


def collect_remote(
    remote: Remote,
    *,
    grace_seconds: float = GRACE_SECONDS,
    dry_run: bool = False,
    force: bool = False,
    on_progress: Callable[[int, int], None],
) -> RemoteCollected:
    """Collect the garbage of a remote. `on_progress` gets (objects deleted since the last call, to
    be deleted in all).

    Raises UsageError: the grace period is too short for pushes that are under way, and not `force`;
    RemoteError: nothing was changed, unless it comes in the middle of deleting.
    """
    if grace_seconds < GRACE_SECONDS_MIN and not force:
        raise UsageError(
            f"a grace period below {GRACE_SECONDS_MIN // 60} minutes can take chunks from under a "
            "push (--force, if none is running)"
        )
    old = remote.probe() - timedelta(seconds=grace_seconds)
    condemned = remote.condemned()
    # First what is there, then what is needed: what a push brings in between is not listed.
    there = {found.path: found for found in _objects(remote)}
    named = in_parallel(lambda path: _needed(remote, path), remote.root_paths())
    images = [paths for paths in named if paths is not None]
    needed = {path for paths in images for path in paths}
    garbage = {path: found for path, found in there.items() if path not in needed}

    ripe = {path: paths for path, (found, paths) in condemned.items() if found.written <= old}
    waiting = {path for _, paths in condemned.values() for path in paths}
    ripened = sorted({path for paths in ripe.values() for path in paths})
    dead = [garbage[path] for path in ripened if path in garbage]
    fresh = [
        found for path, found in garbage.items() if path not in waiting and found.written <= old
    ]
    if not dry_run:
        for at in range(0, len(fresh), _OBJECTS_MAX):
            paths = [found.path for found in fresh[at : at + _OBJECTS_MAX]]
            document = layout.condemned_path(new_salt())
            remote.objects.create(document, layout.encode_condemned(paths))
        _delete(remote, [found.path for found in dead], on_progress)
        # Only now: until then pushes must not rely on what it names.
        for document in (*ripe, *_left_probes(remote, old)):
            remote.objects.delete(document)
    dying = {found.path for found in (*dead, *fresh)}
    return RemoteCollected(
        dry_run,
        len(images),
        sum(layout.is_pack(path) for path in there),
        sum(found.size for found in there.values()),
        sum(path not in waiting and path not in dying for path in garbage),
        len(fresh),
        sum(found.size for found in fresh),
        len(dead),
        sum(found.size for found in dead),
    )


def _objects(remote: Remote) -> list[Found]:
    """The packs, bundles and manifests that are there."""
    folders = (layout.PACKS, layout.INDEXES, layout.MANIFESTS)
    listed = (found for folder in folders for found in remote.objects.list(folder))
    return [found for found in listed if layout.id_of(found.path) is not None]


def _needed(remote: Remote, path: str) -> list[str] | None:
    """The paths of the manifest, the bundles and the packs that the image with this root document
    needs; None: it has been deleted."""
    root = remote.beginning(path)
    while root is not None:
        try:
            manifest = remote.manifest(root)
            break
        except (RemoteNotFoundError, RemoteDamagedError) as error:
            before, root = root, remote.beginning(path)
            if root == before:  # and not replaced meanwhile
                raise RemoteError(
                    f"remote {shown(remote.name)}: what image {shown(root.name)} needs cannot be "
                    f"told, so nothing was deleted: {error} (push it again with --replace, or "
                    "'remote delete' it)"
                ) from None
    if root is None:
        return None
    return [
        layout.manifest_path(root.manifest),
        *(layout.bundle_path(bundle.bundle) for bundle in manifest.bundles),
        *(layout.pack_path(pack.pack) for pack in manifest.packs),
    ]


def _delete(remote: Remote, paths: list[str], on_progress: Callable[[int, int], None]) -> None:
    for at in range(0, len(paths), _DELETES_AT_ONCE):
        some = paths[at : at + _DELETES_AT_ONCE]
        in_parallel(remote.objects.delete, some)
        on_progress(len(some), len(paths))


def _left_probes(remote: Remote, old: datetime) -> list[str]:
    return [found.path for found in remote.objects.list(layout.PROBES) if found.written <= old]
