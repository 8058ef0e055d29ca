"""LMDB's pages, verified before LMDB is trusted with them (`pages`).

An input is patches of a small store's file: offset (2 bytes, in units of 2), length (1 byte: 0 cuts
the file off there), bytes; or, when it begins with 0xff, a whole file. Promises: StoreDamagedError
or findings, of one line each; and LMDB, which dies of what it follows blindly, reads all of a file
that both verifiers pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import lmdb

from dedupstore.errors import StoreDamagedError
from dedupstore.pages import datafile, verify_header, verify_pages
from tools.fuzzing.messages import check_message

BYTES_MAX = 4096
_WHOLE = 0xFF
_MAP_BYTES = 1 << 24
_KEYS = 40


@cache
def _original() -> bytes:
    """A file with a branch, overflow pages, a free list and an empty database."""
    with TemporaryDirectory() as directory:
        env = lmdb.open(directory, map_size=_MAP_BYTES, max_dbs=4, sync=False)
        index, frames = env.open_db(b"index"), env.open_db(b"frames")
        env.open_db(b"empty")
        for step in range(3):
            with env.begin(write=True) as txn:
                for number in range(_KEYS):
                    txn.put(b"%03d" % (number * 7 % 100) + b"k" * 150, b"v" * step, db=index)
                txn.put(b"%d" % step, b"f" * 5000, db=frames)
                txn.delete(b"%d" % (step - 1), db=frames)
        env.close()
        return (Path(directory) / "data.mdb").read_bytes()


def _patched(data: bytes) -> bytes:
    file = bytearray(_original())
    at = 0
    while at + 3 <= len(data):
        offset, length = int.from_bytes(data[at : at + 2], "little") * 2, data[at + 2]
        if not length:
            del file[offset:]
        piece = data[at + 3 : at + 3 + length]
        if offset + len(piece) <= len(file):
            file[offset : offset + len(piece)] = piece
        at += 3 + length
    return bytes(file)


def run(data: bytes) -> None:
    whole = data[:1] == bytes((_WHOLE,))
    file = os.memfd_create("pages")
    try:
        os.write(file, data[1:] if whole else _patched(data))
        path = Path(f"/proc/self/fd/{file}")
        # Nobody is just creating this file. Undone after each input: tests run it in theirs.
        with patch.object(datafile, "_CREATION_WAITS", ()):
            sound = _passes(path)
        if sound:
            _read_all(path)
    finally:
        os.close(file)


def _passes(path: Path) -> bool:
    sound = True
    try:
        verify_header(path)
    except StoreDamagedError as error:
        check_message(error)
        sound = False
    report = verify_pages(path)
    assert all("\n" not in str(finding) for finding in report.findings)
    return sound and not report.findings


def _read_all(path: Path) -> None:
    try:
        env = lmdb.open(
            str(path), subdir=False, max_dbs=8, map_size=_MAP_BYTES, lock=False, readonly=True
        )
    except lmdb.Error:
        return
    try:
        with env.begin() as txn:
            names = [bytes(name) for name, _ in txn.cursor()]
        for name in names:
            database = env.open_db(name, create=False)
            with env.begin(db=database) as txn:
                for key, value in txn.cursor():
                    assert txn.get(key) == value
    except lmdb.Error:
        pass  # refused, not crashed
    finally:
        env.close()


def seeds() -> Mapping[str, bytes]:
    original = _original()
    found = {"sound": b"", "cut": b"\x00\x20\x00", "whole": b"\xff" + original[:8192]}
    pages = range(len(original) // 4096)
    for page in list(pages)[:16]:  # rewrites a header as it is: what mutations begin with
        at = page * 4096
        found[f"page-{page}"] = (at // 2).to_bytes(2, "little") + b"\x18" + original[at : at + 24]
    found["meta"] = b"\x00\x00\x98" + original[:152]
    found["meta-1"] = b"\x00\x08\x98" + original[4096:4248]
    return found
