"""A store that changes while it is served: new images, removed images, gc, imports, two servers."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from tests.interop.corpus import Images
from tests.interop.rig import DEDUPSTORE, PATIENCE_SECONDS, Servers, StoreDirectory

# Says what an image holds each time it gets a line.
READ_ON_DEMAND = """\
h = connect()
print("open", flush=True)
for _ in sys.stdin:
    print(hashlib.sha256(read_all(h)).hexdigest(), flush=True)
h.shutdown()
"""

OPEN = """\
try:
    connect()
except nbd.Error as error:
    print(error.errnum)
"""


class Reader:
    """A client that keeps one export open."""

    def __init__(self, client: subprocess.Popen[str]) -> None:
        self._client = client
        assert self._line() == "open"

    def _line(self) -> str:
        assert self._client.stdout is not None
        return self._client.stdout.readline().strip()

    def digest(self) -> str:
        """SHA-256 of the whole image, read now."""
        assert self._client.stdin is not None
        self._client.stdin.write("read\n")
        self._client.stdin.flush()
        return self._line()

    def leave(self) -> None:
        self._client.communicate()
        assert self._client.returncode == 0


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_image_imported_while_serving_can_be_opened(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    running = server()
    store_dir.import_file(images.noise, "late")
    assert running.read("late") == images.noise.read_bytes()


def test_image_cloned_while_serving_can_be_opened_by_its_glob(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    running = server("image=base", "image=v*")
    store_dir.clone("derived", "v2")
    assert running.read("v2") == images.derived.read_bytes()


def test_renamed_image_answers_to_its_new_name_only(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    running = server()
    store_dir.do("rename", "ragged", "renamed")
    assert running.read("renamed") == images.ragged.read_bytes()
    running.expect_log("no image named 'ragged'")
    assert running.client(OPEN, "ragged").strip() == "2"


def test_name_given_to_another_image_opens_the_new_one(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    running = server()
    assert running.read("clone") == images.base.read_bytes()
    store_dir.remove("clone")
    store_dir.clone("derived", "clone")
    assert running.read("clone") == images.derived.read_bytes()


def test_open_export_serves_after_rm_and_gc_what_it_never_read_before(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    reader = Reader(server().start_client(READ_ON_DEMAND, "ragged"))
    store_dir.remove("ragged")
    store_dir.gc()
    assert reader.digest() == sha256(images.ragged)
    reader.leave()


def test_open_export_serves_with_a_tiny_cache_through_repeated_gc(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    reader = Reader(server("cache=300K").start_client(READ_ON_DEMAND, "derived"))
    store_dir.remove("derived", "ragged")
    for _ in range(2):
        store_dir.gc()
        assert reader.digest() == sha256(images.derived)
    reader.leave()


def test_gc_reclaims_an_image_once_its_last_client_has_left(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    running = server()
    frames = store_dir.frames_of("ragged")
    reader = Reader(running.start_client(READ_ON_DEMAND, "ragged"))
    store_dir.remove("ragged")
    store_dir.gc()
    before = store_dir.totals()
    reader.leave()
    running.stop()
    store_dir.gc()
    assert before[1] - store_dir.totals()[1] == len(frames)


def test_gc_rewrites_frames_that_an_open_export_shares_without_harm(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    # base's frames hold chunks that derived does not use: gc packs the frames anew.
    reader = Reader(server("cache=0").start_client(READ_ON_DEMAND, "derived"))
    store_dir.remove("base", "clone")
    store_dir.gc()
    assert reader.digest() == sha256(images.derived)
    reader.leave()


def test_gc_beside_a_server_and_a_running_import_harms_neither(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    reader = Reader(server("cache=300K").start_client(READ_ON_DEMAND, "base"))
    # The import relies on chunks of derived that lose their only name while it runs.
    command = [DEDUPSTORE, "--store", store_dir.path, "import"]
    with (
        subprocess.Popen([*command, images.noise, "noise"]) as noise,
        subprocess.Popen([*command, images.derived, "again"]) as again,
    ):
        store_dir.remove("derived")
        while noise.poll() is None or again.poll() is None:
            store_dir.gc()
    assert (noise.returncode, again.returncode) == (0, 0)
    store_dir.gc()
    assert reader.digest() == sha256(images.base)
    reader.leave()
    running = server()
    assert running.read("noise") == images.noise.read_bytes()
    assert running.read("again") == images.derived.read_bytes()


def test_check_beside_a_server_and_an_import_finds_nothing(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    reader = Reader(server().start_client(READ_ON_DEMAND, "base"))
    command = [DEDUPSTORE, "--store", store_dir.path, "import", images.noise, "noise"]
    with subprocess.Popen(command) as importing:
        store_dir.do("check")
    assert importing.wait(PATIENCE_SECONDS) == 0
    reader.leave()


def test_two_servers_serve_one_store(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    first, second = server(), server()
    store_dir.import_file(images.noise, "late")
    assert first.read("late") == second.read("late") == images.noise.read_bytes()


def test_gc_respects_what_another_server_has_open(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    first, second = server(), server()
    staying = Reader(first.start_client(READ_ON_DEMAND, "ragged"))
    leaving = Reader(second.start_client(READ_ON_DEMAND, "ragged"))
    leaving.leave()
    second.stop()
    store_dir.remove("ragged")
    store_dir.gc()
    assert staying.digest() == sha256(images.ragged)
    staying.leave()


def test_compaction_disturbs_neither_servers_nor_the_next_import(
    server: Servers, store_dir: StoreDirectory, images: Images
) -> None:
    store_dir.import_file(images.noise, "noise")
    small, roomy = server("cache=0"), server()
    readers = [
        Reader(running.start_client(READ_ON_DEMAND, name))
        for running in (small, roomy)
        for name in ("base", "noise")
    ]
    assert readers[1].digest() == sha256(images.noise)
    store_dir.remove("noise", "derived")
    assert "gave" in store_dir.do("gc", "--compact")  # noise is leased: derived alone goes
    wanted = [sha256(images.base), sha256(images.noise)] * 2
    assert [reader.digest() for reader in readers] == wanted
    readers.pop().leave()
    readers.pop(1).leave()
    before = store_dir.path.joinpath("data.mdb").stat().st_blocks
    store_dir.do("gc", "--compact")
    after = store_dir.path.joinpath("data.mdb").stat().st_blocks
    assert (before - after) * 512 > 15 << 20
    store_dir.import_file(images.noise, "noise")
    assert {reader.digest() for reader in readers} == {sha256(images.base)}
    assert small.read("noise") == images.noise.read_bytes()
    for reader in readers:
        reader.leave()
