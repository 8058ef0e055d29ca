"""What tests do with lazy images: a remote in a directory, stores, and what it was asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.places import Place, add_places
from dedupstore.remote.configuration import add_remote, find_remote
from dedupstore.remote.directory import Directory
from dedupstore.remote.pulling import Pulled
from dedupstore.store import Store
from tests import remotes
from tests.conftest import import_bytes, noise, silent, text as words

# Several frames of each kind; the second image has most of the first.
BASE = noise(11, 1_500_000 // 4096 * 4096) + bytes(8192) + words(12, 900_000)
IMAGES = {"base": BASE, "derived": BASE + noise(13, 300_000)}


def push(store: Store, name: str, remote_name: str = "far", *, replace: bool = False) -> None:
    """Push an image as the command does."""
    remote, _ = find_remote(store.env, remote_name)
    sent: dict[int, Place] = {}
    remotes.push(
        store,
        remote_name,
        name,
        replace=replace,
        on_sent=lambda frame, *place: sent.update({frame: Place(remote.number, *place)}),
    )
    add_places(store.env, sent, int(time.time()) // 3600)


def pull(store: Store, name: str, *, lazy: bool = True, replace: bool = False) -> Pulled:
    """Pull an image under its name."""
    return store.pull("far", name, name, silent, lazy=lazy, replace=replace)


def make_remote(directory: Path, images: dict[str, bytes] | None = None) -> Path:
    """A remote in a directory, with images."""
    url = directory / "far"
    with Store.create(directory / "origin") as origin:
        add_remote(origin.env, "far", [str(url)])
        for name, data in (images or IMAGES).items():
            import_bytes(origin, directory, name, data)
            push(origin, name)
    return url


def pack_files(url: Path) -> list[Path]:
    """The packs of a remote in a directory."""
    return sorted(path for path in (url / "packs").rglob("*") if path.is_file())


def distant_frames(store: Store) -> list[int]:
    """The numbers of the frames whose bytes are elsewhere."""
    with store.env.read() as txn:
        return [
            fmt.decode_frame_key(key)
            for key, record in txn.cursor(db=store.env.frames)
            if fmt.is_distant(record)
        ]


@dataclass(slots=True)
class Asked:
    """What was read from directories: (path, offset, length) each, all threads'."""

    reads: list[tuple[str, int, int]] = field(default_factory=list)
    # Before each read: to wait, or to raise.
    before: list[object] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def packs(self) -> list[tuple[str, int, int]]:
        """Those from packs."""
        return [read for read in self.reads if read[0].startswith("packs/")]

    def bytes(self) -> int:
        """Bytes asked for of packs."""
        return sum(length for _, _, length in self.packs())


@contextmanager
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Note what is read from directories within."""
    found = Asked()
    read = Directory.read

    def noted(self: Directory, path: str, offset: int, length: int) -> bytes:
        with found._lock:
            found.reads.append((path, offset, length))
        for work in found.before:
            work()  # type: ignore[operator]
        return read(self, path, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(Directory, "read", noted)
        yield found
