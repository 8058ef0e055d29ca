"""The one tree of expected failures: everything a user, a disk or an image can cause.

Owns the classes, their exit status and their errno. It prints nothing: the command line turns an
error into one line and `exit_status`, the plugin turns it into `errno`; no other place translates.
Programmer errors stay ordinary exceptions and keep their traceback. Thread-safe: instances are not
changed after they are raised, except that a layer which knows more may fill `image`.
"""

import errno
import os

_SHOWN_CHARACTERS_MAX = 300  # a name of an image has at most 255 bytes


def shown(text: str) -> str:
    """What somebody gave us, quoted, for a message: on one line and no longer than can be read.
    Clients may send 4096 bytes as often as they like, and each is a line of a log."""
    quoted = repr(text)
    if len(quoted) <= _SHOWN_CHARACTERS_MAX:
        return quoted
    return f"{quoted[:_SHOWN_CHARACTERS_MAX]}…"


class DedupError(Exception):
    """Root of the tree. `str(error)` is one line that says what, where and what to do."""

    exit_status = 1
    errno = errno.EIO


class UsageError(DedupError):
    """The request itself is wrong: an option, a parameter or a name that can never work."""

    exit_status = 2
    errno = errno.EINVAL


class InterruptedByUserError(DedupError):
    """Ctrl-C. What was not finished is not there."""

    def __init__(self) -> None:
        super().__init__("interrupted; nothing was finished (run 'dedupstore gc')")


class StoreNotFoundError(DedupError):
    """There is no store at the given directory."""

    errno = errno.ENOENT

    def __init__(self, path: str | os.PathLike[str], reason: str = "no store here") -> None:
        super().__init__(f"{os.fspath(path)}: {reason} (create one with 'dedupstore init')")
        self.path = path


class StoreExistsError(DedupError):
    """`init` was asked for a directory that already holds something."""

    errno = errno.EEXIST


class StoreAccessError(DedupError):
    """The operating system refuses to open or lock the store's files."""

    errno = errno.EACCES


class StoreVersionError(DedupError):
    """The store needs a format version or a feature that this release does not know."""

    errno = errno.EOPNOTSUPP


class StoreFullError(DedupError):
    """The file system or the store's map has no room; the running write was rolled back."""

    errno = errno.ENOSPC


class StoreDamagedError(DedupError):
    """The store's file is truncated, or one of its records or pages fails verification."""


class ChunkDamagedError(StoreDamagedError):
    """A stored frame or chunk fails verification.

    `frame` is the frame's number, `slot` the chunk's place in it (None: the whole frame),
    `image` and `offset` (bytes from the image's start) are filled in by the reader that met it.
    """

    def __init__(self, frame: int, reason: str, slot: int | None = None) -> None:
        super().__init__(frame, reason, slot)
        self.frame = frame
        self.slot = slot
        self.reason = reason
        self.image: str | None = None
        self.offset: int | None = None

    def __str__(self) -> str:
        chunk = f"chunk {self.frame}" if self.slot is None else f"chunk {self.frame}.{self.slot}"
        where = "" if self.image is None else f"image {self.image!r} offset {self.offset}: "
        return f"{where}{chunk} is damaged: {self.reason} (run 'dedupstore check')"


class ConnectionsError(DedupError):
    """A server has as many clients as it may have."""

    errno = errno.EMFILE

    def __init__(self, connections_max: int) -> None:
        super().__init__(f"{connections_max} clients are connected: no more (see connections=)")


class ImageNotFoundError(DedupError):
    """No image of that name."""

    errno = errno.ENOENT

    def __init__(self, name: str) -> None:
        super().__init__(f"no image named {shown(name)} (see 'dedupstore ls')")
        self.name = name


class ImageExistsError(DedupError):
    """An image of that name is already there; names are never overwritten silently."""

    errno = errno.EEXIST

    def __init__(self, name: str) -> None:
        super().__init__(
            f"image {shown(name)} exists already (choose another name, or 'dedupstore rm' it first)"
        )
        self.name = name


class SourceError(DedupError):
    """What is to be imported cannot be read, or is of no known kind."""


class TargetError(DedupError):
    """What is to be written outside the store (an exported file, a socket) cannot be written."""


class TraceError(DedupError):
    """A file is no trace that this release can use; `reason` says why."""

    errno = errno.EINVAL

    def __init__(self, reason: str, where: str = "trace") -> None:
        super().__init__(f"{where}: not a trace: {reason}")
        self.reason = reason


class RecordingError(DedupError):
    """The server that serves an image cannot be found, or does not record its reads."""


class ErofsError(DedupError):
    """An image's EROFS metadata is malformed or of an unknown kind.

    `offset` is where, in bytes from the start of the image.
    """

    errno = errno.EINVAL

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"EROFS metadata at byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class NotShareableError(DedupError):
    """An image cannot be mounted in the way that was asked for; mounted without sharing it can."""

    errno = errno.EOPNOTSUPP


class ProgramError(DedupError):
    """A program that does part of the work is missing or failed; `program` is its name."""

    def __init__(self, program: str, reason: str) -> None:
        super().__init__(f"{program}: {reason}")
        self.program = program


class MountError(DedupError):
    """A device, a server or a mount could not be set up, found or taken down."""


class RemoteError(DedupError):
    """A remote cannot be reached, or refuses. Says which URL, the cause and what to do; `image` and
    `offset` (bytes from the image's start) are filled in by the reader that met it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.image: str | None = None
        self.offset: int | None = None

    def __str__(self) -> str:
        where = "" if self.image is None else f"image {self.image!r} offset {self.offset}: "
        return where + super().__str__()


class RemoteNotFoundError(RemoteError):
    """The remote, or an object or image in it, is not there; every mirror that answered says so."""

    errno = errno.ENOENT


class RemoteConflictError(RemoteError):
    """An object that was to be written only if absent, or unchanged, has been written by another
    meanwhile."""

    errno = errno.EEXIST


class RemoteDamagedError(RemoteError):
    """What a remote gave is not what was written: it fails its digest, or is malformed."""
