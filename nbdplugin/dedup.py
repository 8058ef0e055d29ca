"""nbdkit plugin: every image of a store as a read-only export, from one shared cache.

    nbdkit python nbdplugin/dedup.py [store=DIR] [image=NAME|GLOB]... [cache=SIZE] [metrics=PATH]
           [files=DIR] [connections=N] [pull=REMOTE]

store=DIR      the store; default $DEDUPSTORE, else as for the command line
image=NAME     an image to serve, or a glob; may be repeated; default every image. The export name
               selects the image, the empty name is the first image=
cache=SIZE     bound of the shared cache in bytes (nbdkit's sizes: 512M, 2G); default an eighth of
               memory, at most 4G
metrics=PATH   unix socket to serve Prometheus text on
files=DIR      an empty directory in which each export is a file too, named by its digest; for root
connections=N  clients that may be connected at a time; default 1024, fewer where fewer files may be
               open
pull=REMOTE    an image that the store has not is pulled from there when it is opened, lazily

Callbacks only: the logic is `nbdplugin.session`. Each connection has one thread, which the
callbacks run on; what they call is thread-safe.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import site
import sys
import traceback
from itertools import islice
from pathlib import Path
from typing import Any

import nbdkit

# The embedded interpreter knows neither the script's folder nor a virtual environment. From a
# checkout the packages are beside this folder and the dependencies in .venv; from an installed
# package both are where this folder is.
_ROOT = Path(__file__).resolve().parent.parent
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
for _packages in (_ROOT / ".venv" / "lib" / _VERSION / "site-packages", _ROOT):
    if _packages.is_dir():
        site.addsitedir(str(_packages))
sys.path.insert(0, str(_ROOT))

from dedupstore.errors import DedupError, ImageNotFoundError, UsageError, shown  # noqa: E402
from dedupstore.location import default_store  # noqa: E402
from dedupstore.reader import ImageReader  # noqa: E402
from nbdplugin import stopping, threadstate  # noqa: E402
from nbdplugin.admission import Admission, reserve_files  # noqa: E402
from nbdplugin.session import Config, Session  # noqa: E402
from nbdplugin.threadstate import pin, pinned  # noqa: E402

API_VERSION = 2

_GRID_BYTES = 4096
_REQUEST_BYTES_MAX = 32 << 20
# A reply to a client that asks for the map of more than this is shorter than what it asked for.
_EXTENTS_MAX = 1 << 14
_NUMBER = re.compile("[1-9][0-9]{0,8}", re.ASCII)
_SIZE = re.compile("[0-9]{1,15}[bBsSkKmMgGtTpPeE]?", re.ASCII)

_config = Config(store=default_store(os.environ, os.getuid()).absolute())
_admission: Admission
_session: Session
_metrics: Any = None
_files: Any = None


# nbdkit logs an exception by calling traceback.format_exception. An expected failure is one line.
_format_exception = traceback.format_exception


def _format(kind: Any, error: Any = None, trace: Any = None, **options: Any) -> list[str]:
    if isinstance(error, DedupError):
        return [str(error)]
    return _format_exception(kind, error, trace, **options)


traceback.format_exception = _format  # type: ignore[assignment]


# --- start and end ---


def config(key: str, value: str) -> None:
    if key == "store":
        _config.store = _path(key, value)
    elif key == "image":
        _config.images.append(value)
    elif key == "cache":
        # nbdkit.parse_size logs what it refuses: looking first keeps that to one line.
        try:
            if not _SIZE.fullmatch(value):
                raise ValueError
            _config.cache_bytes = nbdkit.parse_size(value)
        except ValueError:
            raise UsageError(f"cache={_shown(value)}: not a size (such as 512M or 2G)") from None
    elif key == "metrics":
        _config.metrics = _path(key, value)
    elif key == "files":
        _config.files = _path(key, value)
    elif key == "connections":
        if not _NUMBER.fullmatch(value):
            raise UsageError(f"connections={_shown(value)}: not a number of clients")
        _config.connections = int(value)
    elif key == "pull":
        _config.pull = value
    else:
        known = "store, image, cache, metrics, files, connections, pull"
        raise UsageError(f"{_shown(key)}=: unknown parameter (known: {known})")


def _shown(text: str) -> str:
    return shown(text)[1:-1]  # without quotes, as parameters are written


def _path(key: str, value: str) -> Path:
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise UsageError(f"{key}={_shown(value)}: no such user") from None


def thread_model() -> int:
    # Connections in parallel, the requests of one in turn: sixteen threads for each connection
    # spend more on handing Python's lock to one another than they gain (docs/concurrency.md).
    # Clients that want more open more connections: kernel and nbdcopy do so themselves.
    return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS


def get_ready() -> None:
    global _admission
    _config.validate()
    _admission = Admission(reserve_files(_config.connections))
    # Imported only when asked for, which saves 50 ms; and now, while somebody sees a failure.
    if _config.metrics is not None:
        importlib.import_module("nbdplugin.metrics")
    if _config.files is not None:
        importlib.import_module("nbdplugin.files").require_mountable(_config.files)


def after_fork() -> None:
    # Only now: neither LMDB nor threads survive the fork with which nbdkit daemonises.
    global _session, _metrics, _files
    threadstate.install()
    stopping.install(nbdkit.shutdown)  # before there are threads
    _session = Session(_config)
    if _config.metrics is not None:
        _metrics = sys.modules["nbdplugin.metrics"].MetricsServer(_config.metrics, _session)
    if _config.files is not None:
        _files = sys.modules["nbdplugin.files"].ExportFiles(_session, _config.files)


def cleanup() -> None:
    if _files is not None:
        _files.close()
    if _metrics is not None:
        _metrics.close()
    if "_session" in globals():
        _session.close()


# --- exports ---


def preconnect(readonly: bool) -> None:
    _admission.admit()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return [(image, "dedupstore image") for image in _session.exports()]


def default_export(readonly: bool, is_tls: bool) -> str:
    try:
        return _session.default_export()
    except ImageNotFoundError:
        return ""  # `open` refuses it in one line of log; raising here makes nbdkit log two


def open(readonly: bool) -> ImageReader:
    try:
        name = nbdkit.export_name()
    except UnicodeDecodeError:
        nbdkit.set_error(errno.ENOENT)
        raise UsageError("client asked for an export name that is not UTF-8") from None
    try:
        return _session.open(name)
    except DedupError as error:
        nbdkit.set_error(error.errno)
        raise


def close(reader: ImageReader) -> None:
    _session.close_export(reader)


def get_size(reader: ImageReader) -> int:
    return reader.manifest.size


def export_description(reader: ImageReader) -> str:
    return f"dedupstore image {reader.name} {reader.manifest.digest.hex()}"


def block_size(reader: ImageReader) -> tuple[int, int, int]:
    return 1, _GRID_BYTES, _REQUEST_BYTES_MAX


def can_multi_conn(reader: ImageReader) -> bool:
    return True


def is_rotational(reader: ImageReader) -> bool:
    return False


def can_cache(reader: ImageReader) -> int:
    return nbdkit.CACHE_NATIVE


# --- requests ---


def pread(reader: ImageReader, buffer: memoryview, offset: int, flags: int) -> None:
    if not pinned():
        pin()
    try:
        reader.read(buffer, offset)
    except DedupError as error:
        nbdkit.set_error(error.errno)
        raise


def cache(reader: ImageReader, count: int, offset: int, flags: int) -> None:
    if not pinned():
        pin()
    try:
        reader.load(offset, count)
    except DedupError as error:
        nbdkit.set_error(error.errno)
        raise


def extents(reader: ImageReader, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    count_max = 1 if flags & nbdkit.FLAG_REQ_ONE else _EXTENTS_MAX
    found = islice(reader.manifest.extents(offset, count), count_max)
    return [(start, length, hole if is_hole else 0) for start, length, is_hole in found]
