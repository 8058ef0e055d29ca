"""Which files images came from, so that an unchanged file need not be read again.

Owns the rules by which a file counts as unchanged: the same inode with the same size, modification
and change times, as borg, rsync and git have them. No program can set a change time, so a file that
was written to, or replaced, differs; only one that a program keeps mapped and writes to without the
kernel's notice does not, which is what `import --reread` is for. Functions that get a transaction
run inside it and are as thread-safe as that; the others are thread-safe.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import lmdb

from dedupstore import catalog, format as fmt
from dedupstore.env import Environment
from dedupstore.imported import Imported

# A file changed more recently than this when its import began is not remembered: a further change
# could leave the same time behind, as file systems keep times in steps (FAT: of two seconds).
SETTLED_NS = 2_000_000_000


def file_state(status: os.stat_result) -> fmt.FileState | None:
    """What tells whether a file has changed; None for a device, of which nothing does."""
    if not stat.S_ISREG(status.st_mode):
        return None
    return fmt.FileState(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


def is_settled(file: fmt.FileState, began_ns: int) -> bool:
    """Whether a change after `began_ns` is bound to give the file another change time."""
    return file.ctime_ns < began_ns - SETTLED_NS


def import_unchanged(env: Environment, path: Path, name: str) -> Imported | None:
    """Give the image that a file holds a name, if it was imported, is unchanged since, and the
    store still has the image; None if it has to be read. Raises UsageError, ImageExistsError."""
    try:
        file = file_state(path.stat())
    except OSError:
        return None  # reading it tells why
    if file is None:
        return None
    with env.read() as txn:  # by far most files are new: no need to wait for the writer
        if find(txn, env, file) is None:
            return None
    with env.write() as txn:
        origin = find(txn, env, file)
        if origin is None:
            return None
        # gc deletes a manifest in the transaction that finds it without a name, so this one is
        # complete, and stays.
        manifest = catalog.read_summary(txn, env, origin.digest)
        image = fmt.ImageRecord(origin.digest, manifest.size, time.time_ns(), origin.kind)
        catalog.add_image(txn, env, name, image)
    return Imported(
        origin.digest,
        manifest.size,
        manifest.chunks,
        manifest.unique_bytes,
        manifest.zero_bytes,
        new_chunks=0,
        new_bytes=0,
        stored_bytes=0,
    )


def find(txn: lmdb.Transaction, env: Environment, file: fmt.FileState) -> fmt.OriginRecord | None:
    """The image that `file` holds, if the file was imported, is unchanged since, and the store
    still has the image."""
    origin = catalog.read_derived(txn, env, fmt.origin_key(file), fmt.decode_origin)
    if origin is None or origin.file != file:
        return None
    return None if txn.get(origin.digest, db=env.manifests) is None else origin


def remember(txn: lmdb.Transaction, env: Environment, origin: fmt.OriginRecord) -> None:
    """Note what a file holds, instead of what it held."""
    txn.put(fmt.origin_key(origin.file), fmt.encode_origin(origin), db=env.meta)
    catalog.note_feature(txn, env, fmt.FEATURE_COMPAT_ORIGINS)


def forget(txn: lmdb.Transaction, env: Environment, digests: set[bytes] | None = None) -> None:
    """Forget the files of images in `digests`, or all files; damaged records in any case."""
    keys = [bytes(key) for key in txn.cursor(db=env.meta).iternext(values=False)]
    for key in filter(fmt.is_origin_key, keys):
        origin = catalog.read_derived(txn, env, key, fmt.decode_origin)
        if digests is None or origin is None or origin.digest in digests:
            txn.delete(key, db=env.meta)
