"""The one place that opens LMDB and that knows LMDB's rules and errors.

Owns the environment, its named databases and the translation of LMDB's errors into the project's.
LMDB's rules that the rest of the code relies on this module to keep: a path is opened once per
process (opening it twice breaks its locks) and by one process at a time (`opening`), never across a
fork, and buffers die with their transaction. Thread-safe once opened: any thread may begin a
transaction; one writer runs at a time over all processes, readers never block and are never
blocked.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import lmdb

from dedupstore import format as fmt
from dedupstore.constants import LMDB_READERS_MAX, MAP_BYTES, MAP_RESERVE_BYTES
from dedupstore.errors import (
    DedupError,
    StoreAccessError,
    StoreDamagedError,
    StoreFullError,
    StoreNotFoundError,
    StoreVersionError,
)
from dedupstore.memory import advise
from dedupstore.opening import one_opener
from dedupstore.pages import verify_header, verify_trees

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"
DATABASES = ("meta", "frames", "chunks", "manifests", "images", "drafts")
# Made with the first remote: a store without one does without them.
REMOTE_DATABASES = ("places", "distant")

_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.PanicError,
    lmdb.BadTxnError,
    lmdb.CursorFullError,
    lmdb.IncompatibleError,
    lmdb.BadDbiError,
)
# Databases whose trees grow with the store's contents: walking both is for gc and check.
LARGE = frozenset({"frames", "chunks", "places", "distant"})
# What LMDB makes of its lock file for LMDB_READERS_MAX readers: 64 bytes for each and a header.
_LOCK_FILE_BYTES = 64 * (LMDB_READERS_MAX + 2)
# Less room than this on its file system, about a batch of an import, and a failed write is put down
# to that: LMDB writes up to 16 MiB at once, and ext4 may end such a write early with 1 MiB left.
_ROOM_BYTES_MIN = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_open_paths: set[Path] = set()
_open_paths_lock = threading.Lock()


def _translate(error: Exception, path: Path) -> DedupError:
    """The project's error for one of LMDB's or the operating system's."""
    if isinstance(error, lmdb.MapFullError | lmdb.MapResizedError):
        return StoreFullError(
            f"{path}: has grown to its limit of {MAP_BYTES >> 40} TiB; nothing was changed (remove "
            "images with 'dedupstore rm', then run 'dedupstore gc', or import into another store)"
        )
    if isinstance(error, lmdb.VersionMismatchError):
        return StoreVersionError(f"{path}: written by another version of LMDB")
    if isinstance(error, lmdb.ReadersFullError):
        return StoreAccessError(f"{path}: more than {LMDB_READERS_MAX} concurrent readers")
    if isinstance(error, _DAMAGE):
        return StoreDamagedError(f"{path}: damaged ({error}); run 'dedupstore check'")
    code = error.errno if isinstance(error, OSError) else error.args[-1]
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if any(code == c or os.strerror(c) in text for c in _FULL) or (
        os.strerror(errno.EIO) in text and _is_full(path)
    ):
        return StoreFullError(f"{path}: no space left; nothing was changed (free space and retry)")
    if isinstance(error, lmdb.ReadonlyError):
        return StoreAccessError(f"{path}: not writable")
    return StoreAccessError(f"{path}: {text}")


def _is_full(path: Path) -> bool:
    """Whether the file system has no room: LMDB reports a write that came out short as EIO."""
    try:
        room = os.statvfs(path)
    except OSError:
        return False
    return room.f_bavail * room.f_frsize < _ROOM_BYTES_MIN


def _turn(directory: Path) -> AbstractContextManager[None]:
    """Nobody else opens the store within."""
    _reserve_lock_file(directory / LOCK_FILE)
    return one_opener(directory, directory / LOCK_FILE)


def _reserve_lock_file(path: Path) -> None:
    """Give LMDB's lock file its blocks: it is mapped, and on a full disk touching a block that is
    not there kills the process (SIGBUS). One that is in use may stay as it is: what it has of
    blocks is enough for a few readers. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, _LOCK_FILE_BYTES)
    except OSError:
        if not os.fstat(file).st_blocks:
            raise
    finally:
        os.close(file)


@dataclass(frozen=True, slots=True)
class RemoteDatabases:
    """Handles of databases `places` and `distant`."""

    places: lmdb._Database
    distant: lmdb._Database


class Environment:
    """An open LMDB environment with the store's databases as attributes.

    Not to be used across a fork, and opened at most once per process and path.
    """

    def __init__(
        self,
        directory: Path,
        *,
        create: bool = False,
        read_only: bool = False,
        grows: bool = False,
    ) -> None:
        """Open `directory`; with `grows`, for what must leave the map's reserve to others.

        Raises the StoreNotFound/Access/Damaged/VersionError that fits.
        """
        # LMDB itself maps as much as the file already has.
        self._map_bytes = MAP_BYTES if grows else MAP_BYTES + MAP_RESERVE_BYTES
        self.path = directory / DATA_FILE
        self._verified = False
        self._file = -1
        self._key = self.path.resolve()
        if not create:
            _require_file(self.path)
            verify_header(self.path)
        with _open_paths_lock:
            if self._key in _open_paths:
                raise StoreAccessError(f"{directory}: already open in this process")
            _open_paths.add(self._key)
        try:
            self._open(directory, create=create, read_only=read_only)
        except BaseException:
            self._forget()
            raise

    def _open(self, directory: Path, *, create: bool, read_only: bool) -> None:
        with self._errors():
            # On a read-only file system there can be neither locks nor writers: LMDB does without.
            turn = nullcontext() if read_only else _turn(directory)
            with turn:
                self._lmdb = lmdb.open(
                    os.fspath(directory),
                    map_size=self._map_bytes,
                    max_dbs=len(DATABASES) + len(REMOTE_DATABASES),
                    max_readers=LMDB_READERS_MAX,
                    mode=0o600,
                    create=create,
                    readonly=read_only,
                    # Frames are read at random and are larger than a page: the kernel's readahead
                    # around a fault still brings the frame, LMDB's advice decides about the rest.
                    readahead=True,
                    meminit=False,
                    max_spare_txns=16,
                )
            try:
                if not read_only:
                    self._lmdb.reader_check()
                handles = [self._lmdb.open_db(name.encode(), create=create) for name in DATABASES]
                self._remote = self._open_remote()
                self.page_bytes = int(self._lmdb.stat()["psize"])
                self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except lmdb.NotFoundError:
                self._lmdb.close()
                raise StoreDamagedError(f"{self.path}: not a dedupstore store") from None
            except BaseException:
                self._lmdb.close()
                raise
        self.meta, self.frames, self.chunks, self.manifests, self.images, self.drafts = handles

    def _open_remote(self) -> RemoteDatabases | None:
        """The databases of images that are elsewhere, if the store has them."""
        try:
            handles = [self._lmdb.open_db(name.encode(), create=False) for name in REMOTE_DATABASES]
        except lmdb.NotFoundError:
            return None
        return RemoteDatabases(*handles)

    @property
    def remote(self) -> RemoteDatabases | None:
        """The databases of images that are elsewhere; None: the store had none when it was opened
        and nobody here has asked for them since, so no frame seen so far is elsewhere."""
        return self._remote

    def ensure_remote(self, txn: lmdb.Transaction) -> RemoteDatabases:
        """The same for a write transaction, which must end before others use them. What makes them
        says so in the superblock: a release that does not know them must not open the store."""
        if self._remote is not None:
            return self._remote
        handles = [self._lmdb.open_db(name.encode(), txn=txn) for name in REMOTE_DATABASES]
        superblock = txn.get(fmt.SUPERBLOCK_KEY, db=self.meta)
        if superblock is not None:  # a new file that is being filled gets its own last
            noted = fmt.with_incompatible(superblock, fmt.FEATURE_INCOMPAT_REMOTE)
            if noted != superblock:
                txn.put(fmt.SUPERBLOCK_KEY, noted, db=self.meta)
        return RemoteDatabases(*handles)

    def find_remote(self, txn: lmdb.Transaction) -> RemoteDatabases | None:
        """The same, but nothing is made: None, if the store has none by now."""
        if self._remote is None and txn.get(REMOTE_DATABASES[0].encode()) is None:
            return None
        return self.ensure_remote(txn)

    def open_remote(self) -> RemoteDatabases:
        """The databases of images that are elsewhere, made if the store has none: in a transaction
        of its own. Raises what `write` raises."""
        if self._remote is None:
            with self.write() as txn:
                made = self.ensure_remote(txn)
            self._remote = made
        return self._remote

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (lmdb.Error, OSError) as error:
            raise _translate(error, self.path) from error

    @contextmanager
    def read(self) -> Iterator[lmdb.Transaction]:
        """A snapshot. Buffers read from it die with it. Keep it short: pages that it can see are
        not reused, so a long one makes the file grow."""
        with self._errors(), self._lmdb.begin(buffers=True) as txn:
            yield txn

    @contextmanager
    def write(self) -> Iterator[lmdb.Transaction]:
        """The write transaction: durable when the block ends, rolled back when it raises."""
        if not self._verified:
            self.verify()
        with self._errors(), self._lmdb.begin(write=True, buffers=True) as txn:
            yield txn

    def verify(self, *, skip: frozenset[str] = LARGE) -> None:
        """Walk the free list and the trees of the databases, except those in `skip`, and raise
        StoreDamagedError unless LMDB can follow them. Called before the first write: on damaged
        pages LMDB would overwrite what could still be saved, and gc delete what it does not see.
        """
        with self._errors(), self._lmdb.begin():  # no page of this snapshot is reused meanwhile
            verify_trees(self.path, skip=skip)
        self._verified = True

    def oldest_needed(self, txn: lmdb.Transaction) -> int:
        """The oldest transaction whose snapshot somebody may still look at, as LMDB itself decides
        it (`mdb_find_oldest`) before it uses pages again: the last commit's or a reader's. `txn` is
        the write transaction, so no younger snapshot comes up meanwhile.

        What transactions *before* this one gave up is in no reader's snapshot, nor in those of the
        two meta pages.
        """
        with self._errors():
            self._lmdb.reader_check()
            rows = self._lmdb.readers().splitlines()
        seen = (row.split()[-1] for row in rows)  # heading, then pid, thread, transaction or "-"
        return min([txn.id() - 1, *(int(number) for number in seen if number.isdecimal())])

    @property
    def data_file(self) -> int:
        """The data file, open for reading until `close`."""
        return self._file

    def entries(self, txn: lmdb.Transaction, database: lmdb._Database) -> int:
        """Number of keys in a database."""
        return int(txn.stat(database)["entries"])

    @property
    def raw(self) -> lmdb.Environment:
        """LMDB's own handle, for the hot path; errors reach the caller untranslated."""
        return self._lmdb

    def translate(self, error: Exception) -> DedupError:
        """The project's error for one that came through `raw`."""
        return _translate(error, self.path)

    def file_bytes(self) -> int:
        """Bytes that the data file occupies on disk. Its length says nothing: it may have holes."""
        return self.path.stat().st_blocks * 512

    def file_length(self) -> int:
        """Length of the data file, holes included."""
        return self.path.stat().st_size

    def forget_cached_pages(self) -> None:
        """Give the kernel's copies of the data file's pages back, as far as no other process has
        them mapped; what is read next comes from the disk. Never raises."""
        with suppress(OSError, ValueError):
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Mapped pages stay in the page cache: out of our own page tables first.
                for start, length in _mappings(os.fstat(file)):
                    advise(start, length, mmap.MADV_DONTNEED)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)

    def close(self) -> None:
        """Close; no transaction may be running. Idempotent."""
        self._lmdb.close()
        self._forget()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _forget(self) -> None:
        with _open_paths_lock:
            _open_paths.discard(self._key)


def _mappings(status: os.stat_result) -> Iterator[tuple[int, int]]:
    """(address, length) of this process's mappings of a file."""
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            span, _, _, on, inode = line.split(maxsplit=5)[:5]
            if on == device and int(inode) == status.st_ino:
                start, end = (int(number, 16) for number in span.split("-"))
                yield start, end - start


def _require_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFoundError(path.parent) from None
    except OSError as error:
        raise StoreAccessError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise StoreNotFoundError(path.parent, "data.mdb is not a file")
