"""A new store: its files, made so that it is there whole or not at all.

`data.mdb` is made in a working directory and gets its name last, by a link, which never replaces
another. Whatever ends an `init` before that leaves no store, and the next `init` makes one of it.
Thread-safe; of several processes that make one store at once, one does.
"""

from __future__ import annotations

import shutil
import time
import uuid
from contextlib import closing, suppress
from pathlib import Path

from dedupstore import format as fmt
from dedupstore.durability import sync_directory
from dedupstore.env import DATA_FILE, LOCK_FILE, Environment
from dedupstore.errors import StoreAccessError, StoreExistsError
from dedupstore.frames import write_totals
from dedupstore.leases import LOCK_FILE as LEASES_FILE, create_lock_file

TEMPORARY_DIRECTORY = "tmp"
_OURS = {TEMPORARY_DIRECTORY, LEASES_FILE, LOCK_FILE}


def create_store(path: Path) -> None:
    """Make a store in `path`, which must be absent, empty, or what an `init` left that failed.

    Raises StoreExistsError, StoreAccessError, StoreFullError; what was made is removed again then,
    as far as the file system lets it.
    """
    # Named like an import's: gc removes what a crash leaves.
    work = path / TEMPORARY_DIRECTORY / uuid.uuid4().hex
    try:
        path.mkdir(parents=True, exist_ok=True)
        _require_empty(path)
        path.chmod(0o700)
        work.parent.mkdir(mode=0o700, exist_ok=True)
        create_lock_file(path)
        work.mkdir(mode=0o700)
        _fill(work)
        _publish(work, path)
    except FileExistsError:
        raise StoreExistsError(f"{path}: is a file") from None
    except OSError as error:
        raise StoreAccessError(f"{error.filename or path}: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _remove_unfinished(path)


def _require_empty(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    if DATA_FILE in names:
        raise StoreExistsError(f"{path}: already holds a store")
    if names - _OURS:
        raise StoreExistsError(f"{path}: not empty")


def _fill(work: Path) -> None:
    """Make the data file."""
    with closing(Environment(work, create=True)) as env, env.write() as txn:
        superblock = fmt.Superblock(uuid.uuid4().bytes, time.time_ns())
        txn.put(fmt.SUPERBLOCK_KEY, fmt.encode_superblock(superblock), db=env.meta)
        write_totals(txn, env, fmt.Totals())


def _publish(work: Path, path: Path) -> None:
    """Give the data file its name. What is committed is on disk; that the name is must be seen
    to."""
    data = path / DATA_FILE
    try:
        data.hardlink_to(work / DATA_FILE)
    except FileExistsError:
        raise StoreExistsError(f"{path}: already holds a store") from None
    try:
        shutil.rmtree(work)
        sync_directory(work.parent)
        sync_directory(path)
        sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            data.unlink()
        raise


def _remove_unfinished(path: Path) -> None:
    """Unless there is a store, remove what makes none. Nobody else who is just making one is
    disturbed: a working directory keeps `tmp`, and `locks` is made when it is needed."""
    with suppress(OSError):
        if {entry.name for entry in path.iterdir()} <= {TEMPORARY_DIRECTORY, LEASES_FILE}:
            (path / TEMPORARY_DIRECTORY).rmdir()
            (path / LEASES_FILE).unlink()
