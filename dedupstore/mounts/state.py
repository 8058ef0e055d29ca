"""The runtime directory: which files are where, who may change them, and what a record holds.

    RUN/                        0700, ours
      devices.lock              held while a block device is chosen and taken
      <store uuid>/
        lock                    held by whoever changes anything below
        nbd.sock nbd.pid        the server that this tool started; metrics.sock, its metrics
      files/                  that server's exports as files
        <digest[:32]>.<n>/      an attachment: one image or view on one device
          record.json           a Record, replaced atomically
          img                   the server's file, a bind mount of it, where there is no nbd
          mnt/                  the EROFS mount of that device or file
          top/                  the overlay over it, for pool views

Owns layout, locks and records; knows nothing about devices. A record that cannot be read counts as
none. Not thread-safe: one process, one lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

from dedupstore.errors import MountError

_UUID = re.compile(r"[0-9a-f]{32}")
_ATTACHMENT = re.compile(r"[0-9a-f]{32}\.[0-9]+")
_PRIVATE = 0o700
_RECORD_BYTES_MAX = 1 << 20  # thousands of mounts


@dataclass(frozen=True, slots=True)
class Export:
    """Bytes that a server serves for ever: an image or a view, by its digest (hexadecimal).

    `size` in bytes; `kind` as of the image, "erofs" or "raw".
    """

    digest: str
    size: int
    kind: str

    @property
    def name(self) -> str:
        """Its NBD export name. Not the image's name, which may come to mean another image while
        a device waits for its server to come back."""
        return f"/{self.digest}"


@dataclass(frozen=True, slots=True)
class Target:
    """An image of a store and what to mount for it: all that attaching needs to know, so that the
    store can be closed.

    `share` is how (sharing.KERNEL, POOL or NONE); `export` is the image itself or its view;
    `homes` are the views with the objects that a pool view does not have itself. `may_fetch`: the
    store knows remotes, from which a read may have to bring something.
    """

    store: Path
    store_uuid: str
    name: str
    digest: str
    export: Export
    share: str = "none"
    homes: tuple[Export, ...] = ()
    may_fetch: bool = False


@dataclass(slots=True)
class Record:
    """What the kernel cannot know about an attachment.

    `digest`, `size` and `kind` are those of the export it reads, `image` is the image's digest and
    `name` its name when it was attached; `socket` is the server's. `share` is how it is mounted;
    `homes` are the digests of the exports that its mounts read from, besides its own. `device`: the
    nbd device, None with a file; `claims`: the names that `attach` gave the device out for;
    `mounts`: the name that each directory was mounted by. `may_fetch` as in `Target`.
    """

    store: str
    digest: str
    size: int
    kind: str
    image: str
    name: str
    socket: str
    share: str = "none"
    homes: list[str] = field(default_factory=list)
    device: str | None = None
    claims: list[str] = field(default_factory=list)
    mounts: dict[str, str] = field(default_factory=dict)
    may_fetch: bool = False

    @property
    def export(self) -> Export:
        """What the attachment reads."""
        return Export(self.digest, self.size, self.kind)


def default_run(environ: Mapping[str, str], uid: int) -> Path:
    """$DEDUPSTORE_RUN, else /run/dedupstore for root, else in the user's runtime directory."""
    if environ.get("DEDUPSTORE_RUN"):
        return Path(environ["DEDUPSTORE_RUN"])
    if uid == 0:
        return Path("/run/dedupstore")
    return Path(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}") / "dedupstore"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the kernel drops it with the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Runtime:
    """One store's part of the runtime directory."""

    def __init__(self, run: Path, store_uuid: str) -> None:
        # Resolved, for that is how mountinfo and sysfs show paths.
        self.run = run.resolve()
        self.path = self.run / store_uuid
        self.socket = self.path / "nbd.sock"
        self.pidfile = self.path / "nbd.pid"
        self.metrics = self.path / "metrics.sock"
        self.files = self.path / "files"

    def create(self) -> None:
        """Make the directories. Raises MountError if they are not private to this user."""
        try:
            self.run.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            _require_private(self.run)
            self.path.mkdir(mode=_PRIVATE, exist_ok=True)
        except OSError as error:
            raise MountError(f"{error.filename}: {error.strerror}") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held for whole operations: two mounts at once start one server and one device."""
        with locked(self.path / "lock"):
            yield

    @contextmanager
    def device_lock(self) -> Iterator[None]:
        """Held between finding a free device and having it: the devices are all stores'."""
        with locked(self.run / "devices.lock"):
            yield

    def directories(self) -> list[Path]:
        """The attachments' directories, complete or not."""
        try:
            found = [path for path in self.path.iterdir() if _ATTACHMENT.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        return sorted(found)

    def new_directory(self, digest: str) -> Path:
        """Where the next attachment of a content goes; not created. An older one may still be
        there, dead but mounted."""
        taken = {path.name for path in self.directories()}
        names = (f"{digest[:32]}.{i}" for i in count())
        return self.path / next(name for name in names if name not in taken)


def _require_private(run: Path) -> None:
    """Raise MountError, or OSError, unless what is in the runtime directory is ours."""
    status = run.stat()
    if status.st_uid != os.geteuid():
        raise MountError(f"{run}: belongs to another user; it must be yours, mode 0700")
    if status.st_mode & 0o022:
        raise MountError(f"{run}: others can write here; it must be yours, mode 0700")


def runtimes(run: Path) -> list[Runtime]:
    """Every store that this runtime directory knows. Raises MountError if it cannot be read, or is
    not private to this user: records tell what to unmount."""
    try:
        _require_private(run)
        names = sorted(path.name for path in run.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MountError(f"{run}: {error.strerror}") from None
    return [Runtime(run, name) for name in names if _UUID.fullmatch(name)]


def load_record(directory: Path) -> Record | None:
    """An attachment's record; None if it was never finished, or damaged."""
    try:
        with open(directory / "record.json", "rb") as file:
            raw = file.read(_RECORD_BYTES_MAX)
        record = Record(**json.loads(raw))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return record if _is_sound(record) else None


def _is_sound(record: Record) -> bool:
    """Whether every field is of its type, and every path one that a system call takes."""
    texts = [record.store, record.digest, record.kind, record.image, record.name, record.socket]
    texts.append(record.share)
    if record.device is not None:
        texts.append(record.device)
    for texts_of, kind in ((record.homes, list), (record.claims, list), (record.mounts, dict)):
        if not isinstance(texts_of, kind):
            return False
        texts += texts_of
    texts += record.mounts.values()
    size_is_sound = type(record.size) is int and 0 <= record.size < 1 << 63
    return size_is_sound and all(isinstance(text, str) and "\0" not in text for text in texts)


def save_record(directory: Path, record: Record) -> None:
    """Write a record so that others see the old one or the new one."""
    new = directory / "record.new"
    new.write_text(json.dumps(asdict(record)))
    new.replace(directory / "record.json")
