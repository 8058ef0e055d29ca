"""A new data file from the records of one whose pages are damaged.

Owns the way out when LMDB can no longer follow its own file: every record that can still be read is
written into a fresh file, if its guard proves it; what is derived is derived anew; the old file is
kept beside the new one. Nobody may have the store open meanwhile. What is still missing then is
found by an ordinary check, and mended by an ordinary repair. Not thread-safe.
"""

from __future__ import annotations

import fcntl
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import chain, islice
from pathlib import Path

import lmdb

from dedupstore import catalog, format as fmt
from dedupstore.check.findings import Finding
from dedupstore.check.records import FRAME_NUMBERS_SKIPPED, rebuild_index
from dedupstore.check.salvage import salvage
from dedupstore.check.sources import Origin
from dedupstore.constants import IMAGE_NAME_BYTES_MAX
from dedupstore.durability import sync_directory
from dedupstore.env import DATA_FILE, LOCK_FILE, Environment
from dedupstore.errors import ChunkDamagedError, DedupError, StoreAccessError, StoreDamagedError
from dedupstore.frames import TOTALS_KEY, count_totals, measure, write_totals
from dedupstore.pages import RecordReader
from dedupstore.places import decode_places
from dedupstore.values import has_value

DAMAGED_FILE = "data.mdb.damaged"
_RECORDS_AT_ONCE = 256

_Record = tuple[str, bytes, bytes]
"""Database, key, value."""


def rebuild(store: Path) -> int:
    """Put a new data file in the place of a damaged one, which stays as DAMAGED_FILE; return how
    many names were lost, as far as the old file still says how many there were.

    Raises StoreAccessError when the store is open elsewhere, StoreDamagedError when there is no
    superblock left to tell what it was, StoreFullError. Nothing has changed then.
    """
    with _alone(store):
        # Named like an import's working directory, so that gc removes what a crash leaves.
        directory = store / "tmp" / uuid.uuid4().hex
        try:
            directory.mkdir(mode=0o700, parents=True)
            with closing(Environment(directory, create=True)) as env:
                lost = _fill(env, store / DATA_FILE)
            damaged = store / DAMAGED_FILE
            damaged.unlink(missing_ok=True)
            damaged.hardlink_to(store / DATA_FILE)
            (directory / DATA_FILE).replace(store / DATA_FILE)
            sync_directory(store)
            return lost
        except OSError as error:
            raise StoreAccessError(f"{error.filename or store}: {error.strerror}") from None
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Hold the lock that LMDB takes when it is the first to open a store; whoever opens it now
    waits, and finds the new file."""
    try:
        with open(store / LOCK_FILE, "ab") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            yield
    except BlockingIOError:
        raise StoreAccessError(
            f"{store}: in use (end its servers and mounts; then 'dedupstore check --repair')"
        ) from None
    except OSError as error:
        raise StoreAccessError(f"{store / LOCK_FILE}: {error.strerror}") from None


def _fill(env: Environment, damaged: Path) -> int:
    reader = RecordReader(damaged)
    records = (found for key, value in reader.records() if (found := _proven(key, value)))
    frame_next = 0
    while batch := list(islice(records, _RECORDS_AT_ONCE)):
        with env.write() as txn:
            for database, key, value in batch:
                if key == TOTALS_KEY and database == "meta":
                    frame_next = max(frame_next, fmt.decode_totals(value).frame_next)
                else:
                    _put(txn, env, database, key, value)
    with env.write() as txn:
        if txn.get(fmt.SUPERBLOCK_KEY, db=env.meta) is None:
            raise StoreDamagedError(
                f"{damaged}: no superblock is left in it (make a new store with 'dedupstore init' "
                "and import the images again)"
            )
        _forget_unplaced(txn, env)
        rebuild_index(txn, env)
        counted = count_totals(txn, env, frame_next)
        if not frame_next or counted.frame_next > frame_next:
            counted = count_totals(txn, env, counted.frame_next + FRAME_NUMBERS_SKIPPED)
        write_totals(txn, env, counted)
        return max(reader.trees.get(b"images", 0) - env.entries(txn, env.images), 0)


def _proven(key: bytes, value: bytes) -> _Record | None:
    """What a record is, as its guard proves: a guard is seeded with the key. Index entries, origins
    and drafts are not needed: they are derived, forgotten, or of imports that no longer run."""
    try:
        if len(key) == fmt.FRAME_KEY_BYTES:
            # A damaged one, too, if the repair that follows can save some of its chunks.
            frame = fmt.decode_frame_key(key)
            with suppress(StoreDamagedError):
                decode_places(value, frame)
                return "places", key, value
            if _is_sealed(value, frame) or salvage(value, frame, {}).found:
                return "frames", key, value
        if len(key) == fmt.DIGEST_BYTES and len(value) > fmt.INDEX_BYTES:
            fmt.decode_manifest_summary(value, key)
            return "manifests", key, value
    except DedupError:
        pass
    # An image may be named as a record of `meta` is: its value tells.
    decoders: dict[str | None, Callable[[fmt.Buffer, bytes], object]] = {
        "superblock": lambda record, _key: fmt.decode_superblock(record),
        "totals": lambda record, _key: fmt.decode_totals(record),
        "view": fmt.decode_view,
        "lost": fmt.decode_lost,
        "lazy": fmt.decode_wish,
        "remote": fmt.decode_remote,
    }
    kind = fmt.meta_kind(key)
    # A lost record's decoder takes a longer one, too.
    may_be_image = len(value) == fmt.IMAGE_BYTES and kind != "remote"
    if kind in decoders and not may_be_image:
        with suppress(DedupError):
            decoders[kind](value, key)
            return "meta", key, value
    if 0 < len(key) <= IMAGE_NAME_BYTES_MAX:
        with suppress(DedupError):
            catalog.decode_name(key)
            fmt.decode_image(value, key)
            return "images", key, value
    return None


def _is_sealed(record: fmt.Buffer, frame: int) -> bool:
    try:
        fmt.verify_frame(record, frame)
    except ChunkDamagedError:
        return False
    return True


def _put(txn: lmdb.Transaction, env: Environment, database: str, key: bytes, value: bytes) -> None:
    """Keep a record; of several versions, which there are when the free list cannot be read, the
    frame that holds most, and the newest image."""
    handle = env.ensure_remote(txn).places if database == "places" else getattr(env, database)
    there = txn.get(key, db=handle)
    if there is None or _worth(database, key, there) < _worth(database, key, value):
        txn.put(key, value, db=handle)


def _forget_unplaced(txn: lmdb.Transaction, env: Environment) -> None:
    """Delete the places of frames that are not here any more."""
    remote = env.find_remote(txn)
    if remote is None:
        return
    superblock = txn.get(fmt.SUPERBLOCK_KEY, db=env.meta) or b""
    noted = fmt.with_incompatible(superblock, fmt.FEATURE_INCOMPAT_REMOTE)
    txn.put(fmt.SUPERBLOCK_KEY, noted, db=env.meta)
    for key in [bytes(key) for key in txn.cursor(db=remote.places).iternext(values=False)]:
        if not has_value(txn, env.frames, key):
            txn.delete(key, db=remote.places)


def _worth(database: str, key: bytes, value: fmt.Buffer) -> int:
    if database == "places":
        record = decode_places(value, fmt.decode_frame_key(key))
        return len(record.places) << 32 | record.used
    if database == "frames":
        frame = fmt.decode_frame_key(key)
        return measure(value, frame).chunks if _is_sealed(value, frame) else -1
    return fmt.decode_image(value, key).created_ns if database == "images" else 0


def name_lost(env: Environment, sources: Sequence[Origin], lost: int) -> tuple[Finding, ...]:
    """Names for images that have lost theirs: as other stores call them, at most as many as were
    lost; and for those that nobody knows one made of their digest. Says what was done."""
    found = []
    with env.write() as txn:
        for name, image in chain.from_iterable(source.names() for source in sources):
            here = txn.get(image.digest, db=env.manifests) is not None
            if (
                lost
                and here
                and txn.put(name, fmt.encode_image(image, name), db=env.images, overwrite=False)
            ):
                lost -= 1
                called = catalog.decode_name(name)
                found.append(Finding("images", "name was lost", image=called, mended=True))
        named = {image.digest for _, image in catalog.list_images(txn, env)}
        named.update(
            view.digest
            for _, _, view in catalog.list_views(txn, env)
            if isinstance(view, fmt.ViewRecord)
        )
        unnamed = [
            (bytes(key), fmt.decode_manifest_summary(record, bytes(key)).size)
            for key, record in txn.cursor(db=env.manifests)
            if bytes(key) not in named
        ]
        for digest, size in unnamed:
            called = f"recovered-{digest.hex()[:16]}"
            image = fmt.ImageRecord(digest, size, time.time_ns(), fmt.KIND_RAW)
            catalog.add_image(txn, env, called, image)
            lost = max(lost - 1, 0)
            reason = "has lost its name, or had none any more; was given this one"
            found.append(Finding("images", reason, image=called, mended=True))
    if lost:
        found.append(Finding("images", f"{lost} names are lost"))
    return tuple(found)
