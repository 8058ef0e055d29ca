"""An nbdkit plugin: a disk in memory that records, in order, what is written to it.

`nbdkit python recording.py size=BYTES log=DIR`. DIR/index has a record for each write, trim,
zeroing and flush, in the order in which they were done; DIR/data the bytes of the writes. A record
is there before the request is answered, and requests are served one at a time: what a client was
told is done lies before the end of the index, and nothing that begins later does. Loaded by
nbdkit's interpreter, so it imports nothing of the project; `states` reads what it writes.
"""

from __future__ import annotations

import os
import struct

import nbdkit

API_VERSION = 2
RECORD = struct.Struct("<BB6xQQQ")  # kind, whether FUA was asked for, offset, length, place in data
WRITE, ZERO, FLUSH = 1, 2, 3

_parameters: dict[str, str] = {}
_disk = bytearray()
_files: list[int] = []
_data_bytes = 0


def thread_model():
    return nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS


def config(key, value):
    _parameters[key] = value


def config_complete():
    _disk.extend(bytes(int(_parameters["size"])))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    for name in ("index", "data"):
        _files.append(os.open(os.path.join(_parameters["log"], name), flags, 0o600))


def open(readonly):
    return 1


def get_size(h):
    return len(_disk)


def can_fua(h):
    return nbdkit.FUA_NATIVE


def can_flush(h):
    return True


def can_trim(h):
    return True


def can_zero(h):
    return True


def pread(h, buf, offset, flags):
    buf[:] = memoryview(_disk)[offset : offset + len(buf)]


def pwrite(h, buf, offset, flags):
    global _data_bytes
    memoryview(_disk)[offset : offset + len(buf)] = buf
    data = memoryview(buf)
    while data:
        data = data[os.write(_files[1], data) :]
    _note(WRITE, flags, offset, len(buf), _data_bytes)
    _data_bytes += len(buf)


def zero(h, count, offset, flags):
    memoryview(_disk)[offset : offset + count] = bytes(count)
    _note(ZERO, flags, offset, count, 0)


def trim(h, count, offset, flags):
    # What is trimmed may read as anything; as zeros it does the most harm to whoever still needs
    # it.
    zero(h, count, offset, flags)


def flush(h, flags):
    _note(FLUSH, 0, 0, 0, 0)


def _note(kind, flags, offset, length, place):
    os.write(_files[0], RECORD.pack(kind, bool(flags & nbdkit.FLAG_FUA), offset, length, place))
