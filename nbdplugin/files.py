"""Exports as files of a directory, through FUSE: the way into the kernel where it has no nbd.

`DIR/<digest>` is the export "/<digest>": an image or a view, by its 64 hexadecimal digits. They are
found by name only; listing the directory shows none. Owns the mount and the threads that answer the
kernel, from the same session, and so the same cache, as NBD: a read is one system call each way,
where nbdfuse in between makes it four and two processes to wake. docs/performance.md has the
figures, docs/concurrency.md the threads.

Errors go where nbdkit's go: standard error, or the system log once it has daemonised.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import re
import struct
import sys
import syslog
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dedupstore import syscalls
from dedupstore.errors import DedupError, UsageError
from dedupstore.reader import ImageReader
from nbdplugin import fuse
from nbdplugin.session import Session

_DEVICE = Path("/dev/fuse")
# Requests answered at a time: misses decompress in parallel, and more than this many threads only
# wait for Python's lock.
_THREADS = 4
_STOP_SECONDS = 5.0
_FUSE_DEV_IOC_CLONE = 0x8004E500
_NAME = re.compile("[0-9a-f]{64}")
_FLAGS = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
# read(2) of the device: the request was taken back meanwhile, or a signal came.
_AGAIN = (errno.ENOENT, errno.EINTR, errno.EAGAIN)


@dataclass(slots=True)
class _Node:
    """A file that the kernel knows, `lookups` times."""

    name: str
    size: int
    lookups: int = 0


def require_mountable(directory: Path) -> None:
    """Raise UsageError if exports cannot become files here: once nbdkit has daemonised, nobody
    would see why."""
    if os.geteuid() != 0:
        raise UsageError(f"files={directory}: needs root")
    try:
        if any(directory.iterdir()):
            raise UsageError(f"files={directory}: not an empty directory")
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise UsageError(f"files={directory}: {error.filename}: {error.strerror}") from None


class ExportFiles:
    """A session's exports as files, until `close`."""

    def __init__(self, session: Session, directory: Path) -> None:
        """Mount on `directory` and answer. Raises OSError."""
        self._session = session
        self._directory = directory
        # Nodes and handles, which the kernel is told; changed under the lock, read without.
        self._lock = threading.Lock()
        self._numbers = itertools.count(fuse.ROOT + 1)
        self._nodes: dict[int, _Node] = {}
        self._by_name: dict[str, int] = {}
        self._open: dict[int, ImageReader] = {}
        first = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        self._devices = [first]
        options = f"fd={first},rootmode=40000,user_id=0,group_id=0,max_read={fuse.READ_BYTES_MAX}"
        syscalls.mount(Path("dedupstore"), directory, "fuse.dedupstore", _FLAGS, options)
        for _ in range(_THREADS - 1):
            device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
            fcntl.ioctl(device, _FUSE_DEV_IOC_CLONE, struct.pack("=I", first))
            self._devices.append(device)
        self._threads = [
            threading.Thread(target=self._serve, args=(device,), name=f"files-{i}", daemon=True)
            for i, device in enumerate(self._devices)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Take the mount away, whoever uses it, and end the threads."""
        with suppress(OSError):  # somebody has unmounted it
            syscalls.abort_mount(self._directory)
        for thread in self._threads:
            thread.join(_STOP_SECONDS)
        for reader in self._open.values():
            self._session.close_export(reader)
        self._open.clear()

    def _serve(self, device: int) -> None:
        """A thread: answer requests until the mount is gone."""
        request = bytearray(fuse.REQUEST_BYTES_MAX)
        # Anonymous memory: what large reads never touched is not there.
        reply = memoryview(mmap.mmap(-1, fuse.OUT_HEADER.size + fuse.READ_BYTES_MAX))
        received = memoryview(request)
        header, read_in = fuse.IN_HEADER.unpack_from, fuse.READ_IN.unpack_from
        while True:
            try:
                os.readv(device, [request])
            except OSError as error:
                if error.errno in _AGAIN:
                    continue
                return  # ENODEV: unmounted
            length, opcode, unique, node, *_ = header(request)
            if opcode == fuse.READ:
                handle, offset, size, _ = read_in(request, fuse.IN_HEADER.size)
                end = self._read(reply, handle, offset, size, unique)
                answer: bytes | memoryview = reply[:end]
            elif opcode in (fuse.FORGET, fuse.BATCH_FORGET, fuse.INTERRUPT):
                self._forget(received, opcode, node)
                continue  # the kernel expects no answer
            else:
                answer = self._answer(received[:length], opcode, node, unique)
            with suppress(OSError):  # ENOENT: nobody waits for it any more
                os.write(device, answer)

    def _read(self, reply: memoryview, handle: int, offset: int, size: int, unique: int) -> int:
        """Put the whole answer to a READ into `reply`; returns its length."""
        begin = fuse.OUT_HEADER.size
        number = 0
        try:
            reader = self._open[handle]
            size = max(min(size, reader.manifest.size - offset), 0)
            if size:
                reader.read(reply[begin : begin + size], offset)
        except Exception as error:
            number, size = _report(error), 0
        fuse.OUT_HEADER.pack_into(reply, 0, begin + size, -number, unique)
        return begin + size

    def _answer(self, request: memoryview, opcode: int, node: int, unique: int) -> bytes:
        """The whole answer to anything but a READ."""
        number, data = 0, b""
        try:
            data = self._data(request, opcode, node)
        except Exception as error:
            number = _report(error)
        return fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(data), -number, unique) + data

    def _data(self, request: memoryview, opcode: int, node: int) -> bytes:
        match opcode:
            case fuse.INIT:
                return fuse.init(request)
            case fuse.LOOKUP:
                return self._look_up(fuse.name(request, len(request)), node)
            case fuse.GETATTR:
                size = 0 if node == fuse.ROOT else self._nodes[node].size
                return fuse.attributes(node, size)
            case fuse.OPEN:
                return self._opened(self._nodes[node].name)
            case fuse.OPENDIR:
                return fuse.opened(0)
            case fuse.STATFS:
                return fuse.statfs()
            case fuse.RELEASE:
                self._release(fuse.ONE_NUMBER.unpack_from(request, fuse.IN_HEADER.size)[0])
                return b""
            case fuse.FLUSH | fuse.READDIR | fuse.RELEASEDIR | fuse.DESTROY:
                return b""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _look_up(self, name: str, parent: int) -> bytes:
        if parent != fuse.ROOT or not _NAME.fullmatch(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        reader = self._session.open(f"/{name}")
        size = reader.manifest.size
        self._session.close_export(reader)
        with self._lock:
            number = self._by_name.get(name)
            if number is None:
                number = self._by_name[name] = next(self._numbers)
                self._nodes[number] = _Node(name, size)
            self._nodes[number].lookups += 1
        return fuse.entry(number, size)

    def _opened(self, name: str) -> bytes:
        reader = self._session.open(f"/{name}")
        with self._lock:
            handle = next(self._numbers)
            self._open[handle] = reader
        return fuse.opened(handle)

    def _release(self, handle: int) -> None:
        with self._lock:
            reader = self._open.pop(handle)
        self._session.close_export(reader)

    def _forget(self, request: memoryview, opcode: int, node: int) -> None:
        if opcode == fuse.INTERRUPT:
            return  # the request it means is answered all the same
        with self._lock:
            for number, times in fuse.forgets(request, opcode, node):
                found = self._nodes.get(number)
                if found is None:
                    continue
                found.lookups -= times
                if found.lookups <= 0:
                    del self._nodes[number], self._by_name[found.name]


def _report(error: Exception) -> int:
    """The errno that the kernel is told; what a reader of the log has to know is logged."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, DedupError) and error.errno == errno.ENOENT:
        return errno.ENOENT
    _log(str(error) if isinstance(error, DedupError) else repr(error))
    return error.errno if isinstance(error, DedupError) else errno.EIO


def _log(message: str) -> None:
    if os.fstat(2).st_rdev == Path(os.devnull).stat().st_rdev:
        syslog.syslog(syslog.LOG_ERR, message)
    else:
        print(f"nbdkit: dedupstore: error: {message}", file=sys.stderr, flush=True)
