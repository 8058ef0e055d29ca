"""Which exports `image=` leaves: by name, by digest, by file, by default; and that a client cannot
tell what is kept from it from what is not there."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from dedupstore.mounts.targets import find_target
from dedupstore.store import Store
from tests.interop.rig import Servers, StoreDirectory, no_progress, wait_until
from tests.interop.test_files import files
from tests.interop.test_hostile_clients import LIST, REQUEST_MAGIC, Connection, connected
from tests.interop.test_plugin_start import start_refused

__all__ = ["files"]  # a fixture

INFO = 6
UNKNOWN = (1 << 31) + 6


@pytest.fixture
def views(store_dir: StoreDirectory, tmp_path: Path) -> dict[str, str]:
    """Digests of the images `mine` and `other`, which share a file, and of a view of each."""
    shared, digests = os.urandom(200_000), {}
    for name in ("mine", "other"):
        tree = tmp_path / name
        tree.mkdir()
        (tree / "shared").write_bytes(shared)
        (tree / "own").write_bytes(os.urandom(100_000))
        with Store(store_dir.path) as store:
            store.import_path(tree, name, no_progress)
            target = find_target(store, name, ("pool", "none"))
        assert target.share == "pool"
        digests[name], digests[f"view of {name}"] = target.digest, target.export.digest
    assert len(set(digests.values())) == 4
    return digests


def asked(client: Connection, option: int, name: str) -> int:
    """How the server answers INFO or GO for an export."""
    raw = name.encode()
    return client.option(option, struct.pack(">I", len(raw)) + raw + b"\0\0")


def test_digest_is_served_if_an_allowed_image_or_its_view_has_it(
    server: Servers, views: dict[str, str]
) -> None:
    running = server("image=m[hi]ne")
    running.expect_log("no image named '/")
    with connected(running) as client:
        assert not client.go(f"/{views['other']}".encode())
        assert not client.go(f"/{views['view of other']}".encode())
    for what in ("mine", "view of mine"):
        with connected(running) as client:
            assert client.go(f"/{views[what]}".encode()), what


def test_without_image_every_view_is_served(server: Servers, views: dict[str, str]) -> None:
    running = server()
    for digest in views.values():
        with connected(running) as client:
            assert client.go(f"/{digest}".encode())


def test_file_is_there_if_an_allowed_image_or_its_view_has_its_digest(
    files: Path, server: Servers, views: dict[str, str]
) -> None:
    server(f"files={files}", "image=mine")
    wait_until(files.is_mount)
    assert (files / views["mine"]).stat().st_size
    assert (files / views["view of mine"]).stat().st_size
    for what in ("other", "view of other"):
        with pytest.raises(FileNotFoundError):
            (files / views[what]).stat()


def test_what_is_kept_from_a_client_looks_like_what_is_not_there(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server("image=base")
    running.expect_log("no image named")
    kept = ["derived", "ragged", f"/{store_dir.digest('derived')}"]
    with connected(running) as client:
        for name in (*kept, "nowhere", "/" + "0" * 64):
            assert asked(client, INFO, name) == UNKNOWN, name
        assert not client.go(b"derived")
        assert client.option(LIST, b"") == 1


def test_clone_of_an_allowed_image_is_not_allowed_by_its_contents(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server("image=base")
    running.expect_log("no image named 'clone'")
    with connected(running) as client:
        assert not client.go(b"clone")
        assert client.go(f"/{store_dir.digest('clone')}".encode()), "which are base's"


def test_digest_of_an_image_that_lost_its_allowed_name_is_refused(
    server: Servers, store_dir: StoreDirectory
) -> None:
    digest = store_dir.digest("derived")
    running = server("image=d*", "image=base")
    running.expect_log("no image named '/")
    store_dir.do("rename", "derived", "kept")
    with connected(running) as client:
        assert not client.go(f"/{digest}".encode())


def test_removed_image_has_its_digest_until_gc_where_nothing_is_kept_from_clients(
    server: Servers, store_dir: StoreDirectory
) -> None:
    export = f"/{store_dir.digest('derived')}".encode()
    running = server()
    running.expect_log("no image named")
    store_dir.remove("derived")

    def opens() -> bool:
        with connected(running) as client:
            found: bool = client.go(export)
            if found:  # and closes it: gc keeps what is open
                client.socket.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 2, 7, 0, 0))
                assert client.socket.recv(1) == b""
            return found

    def is_reclaimed() -> bool:
        # Again, for nbdkit hangs up before it has the plugin close the export.
        store_dir.gc()
        return not opens()

    assert opens()
    wait_until(is_reclaimed)


def test_glob_that_matches_nothing_serves_nothing(
    server: Servers, store_dir: StoreDirectory
) -> None:
    running = server("image=z*")
    running.expect_log("no image named")
    with connected(running) as client:
        for name in (b"", b"base", b"z*", f"/{store_dir.digest('base')}".encode()):
            assert not client.go(name), name


@pytest.mark.parametrize("name", ["", "/", "base/", "ba", "base\n", "BASE"])
def test_image_that_is_none_is_refused_at_the_start(store_dir: StoreDirectory, name: str) -> None:
    assert "no image named" in start_refused(f"store={store_dir.path}", f"image={name}")


@pytest.mark.parametrize("name", ["b*", "[base]", "ba?e", "/base", "", "base/../derived"])
def test_no_image_has_a_name_that_could_be_taken_for_a_glob_or_a_digest(
    store_dir: StoreDirectory, name: str
) -> None:
    assert store_dir.refuse("clone", "base", name, status=2)
