"""Export names, which clients send: any bytes, up to 4096 (`nbdplugin.session`).

An input is the `image=` parameters, one a line, an empty line, and the export name. Promises: a
DedupError of one line, or the bytes of an image that has this name, or this digest, or is the
default, and that a parameter allows.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from dedupstore.errors import DedupError
from dedupstore.store import Store
from nbdplugin.session import Config, Session
from tools.fuzzing.messages import check_message

BYTES_MAX = 4096
_NAMES = ("base", "web/1", "web/2", "secret", "sécret-ü")
_BLOCK = 4096
_PATTERNS_MAX = 8


@cache
def _session() -> Session:
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    with Store.create(directory / "store") as store:
        for number, name in enumerate(_NAMES):
            source = directory / "source"
            source.write_bytes(bytes((number + 1,)) * _BLOCK)
            store.import_path(source, name, lambda _done, _all: None)
    session = Session(Config(directory / "store", cache_bytes=1 << 20))
    atexit.register(session.close)
    return session


@cache
def _digests() -> dict[str, str]:
    return {image.digest: image.name for image in _session().store.images()}


def run(data: bytes) -> None:
    parameters, _, export = data.partition(b"\n\n")
    patterns = [line.decode("utf-8", "surrogateescape") for line in parameters.split(b"\n") if line]
    patterns = patterns[:_PATTERNS_MAX]
    try:
        name = export.decode()  # the plugin refuses other names before it gets here
    except UnicodeDecodeError:
        return
    session = _session()
    session._patterns = patterns
    served = list(session.exports())
    try:
        reader = session.open(name)
    except DedupError as error:
        check_message(error)
        assert not _allowed(name, patterns)
        return
    try:
        buffer = bytearray(_BLOCK)
        reader.read(memoryview(buffer), 0)
    finally:
        session.close_export(reader)
    image = _NAMES[buffer[0] - 1]
    assert image in served
    assert not patterns or _allowed(image, patterns)
    assert name in ("", image) or _digests().get(name.removeprefix("/")) == image


def _allowed(name: str, patterns: list[str]) -> bool:
    """Whether a name is an image's that the parameters allow."""
    names = [name] if name in _NAMES else []
    return any(
        fnmatchcase(each, p) if set(p) & set("*?[") else each == p
        for each in names
        for p in patterns
    ) or (bool(names) and not patterns)


def seeds() -> Mapping[str, bytes]:
    return {
        "plain": b"\n\nbase",
        "default": b"\n\n",
        "glob": b"web/*\nb?se\n\nweb/2",
        "hidden": b"web/*\n\nsecret",
        "parent": b"web/*\n\nweb/../secret",
        "class": b"[a-c]ase\n\nbase",
        "asked-glob": b"web/*\n\n*",
        "slash": b"\n\n/base",
        "digest": b"base\n\n/" + b"0" * 64,
        "accents": b"\n\ns\xc3\xa9cret-\xc3\xbc",
        "zero": b"\n\nbase\0x",
        "long": b"\n\n" + b"n" * 4000,
        "stars": b"*a*a*a*a*b\n\n" + b"a" * 200,
    }
