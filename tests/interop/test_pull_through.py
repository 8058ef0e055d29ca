"""Images that are pulled when they are used: by `mount --pull`, and by a server with `pull=`.

The real nbdkit, nginx and EROFS, the remote behind a link that counts requests (tools/ondemand).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.corpus import Images
from tests.interop.mountrig import MountRig, mount_rig, processes_with
from tests.interop.rig import DEDUPSTORE, Servers, StoreDirectory, mounts_below
from tests.interop.shop import Far
from tests.interop.test_lazy_mounts import files

READ = "h = connect(); [h.pread(4096, int(at)) for at in arguments]"
REFUSED = """
try:
    connect()
except nbd.Error as error:
    print(error.errno or "refused")
"""


@pytest.fixture
def host(far: Far, empty_store_dir: StoreDirectory) -> StoreDirectory:
    """A store that knows the remote, without images."""
    empty_store_dir.do("remote", "add", "far", far.url)
    return empty_store_dir


@pytest.fixture
def rig(host: StoreDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[MountRig]:
    with mount_rig(host, monkeypatch) as made:
        yield made


@pytest.fixture
def serve(host: StoreDirectory) -> Iterator[Servers]:
    started = Servers(host.path)
    yield started
    started.close()


def names(store: StoreDirectory) -> list[str]:
    return [image["name"] for image in json.loads(store.do("ls", "--json"))["images"]]


# --- mount --pull ---


def test_mount_pulls_what_the_store_has_not_and_asks_for_the_root_document_once(
    rig: MountRig, far: Far, images: Images
) -> None:
    directory = rig.directory()
    far.link.counters(reset=True)
    assert rig.store.do("mount", "--pull", "far", "base", directory) == ""
    # The document, and the frames of the first block, which nobody has to wait for.
    assert 2 <= far.link.counters().requests <= 4
    assert json.loads(rig.store.do("info", "base", "--json"))["missing_bytes"] > 0
    assert files(directory) == files(images.base_tree)
    rig.umount(directory)
    rig.assert_nothing_left()
    rig.store.check()


def test_attach_pulls_what_the_store_has_not(rig: MountRig, images: Images) -> None:
    device = Path(rig.store.do("attach", "--pull", "far", "base").removesuffix("\n"))
    size = images.base.stat().st_size
    with device.open("rb") as opened:
        assert opened.read()[:size] == images.base.read_bytes()
    rig.store.do("detach", "base")
    rig.assert_nothing_left()


def test_mount_of_an_image_that_is_here_asks_no_remote(rig: MountRig, far: Far) -> None:
    directory = rig.directory()
    rig.store.do("mount", "--pull", "far", "base", directory)
    rig.umount(directory)
    rig.store.do("prefetch", "base")
    far.link.down()
    rig.store.do("mount", "--pull", "far", "base", directory)
    assert any(directory.iterdir())
    rig.umount(directory)


@pytest.mark.parametrize("running", [False, True])
def test_mount_that_cannot_pull_says_so_in_one_line_and_leaves_nothing(
    rig: MountRig, running: bool
) -> None:
    mounted = rig.directory()
    if running:
        rig.store.do("mount", "--pull", "far", "base", mounted)
    for remote, name, said in (
        ("far", "nope", "no image named 'nope'"),
        ("nowhere", "nope", "no remote"),
    ):
        line = rig.store.refuse("mount", "--pull", remote, name, rig.directory())
        assert said in line
    assert names(rig.store) == (["base"] if running else [])
    if running:
        rig.umount(mounted)
    rig.assert_nothing_left()


def test_mount_on_what_is_no_directory_pulls_nothing(rig: MountRig, far: Far) -> None:
    far.link.counters(reset=True)
    line = rig.store.refuse("mount", "--pull", "far", "base", rig.base / "missing")
    assert "missing" in line
    assert far.link.counters().requests == 0
    assert names(rig.store) == []
    assert mounts_below(rig.base) == []
    assert processes_with(str(rig.run)) == []


def test_mounts_of_one_image_at_once_pull_it_and_start_one_server(
    rig: MountRig, images: Images
) -> None:
    directories = [rig.directory() for _ in range(3)]
    processes = [
        subprocess.Popen(
            [DEDUPSTORE, "--store", rig.store.path, "mount", "--pull", "far", "base", directory],
            stderr=subprocess.PIPE,
        )
        for directory in directories
    ]
    assert [process.communicate()[1] for process in processes] == [b""] * 3
    assert len(rig.devices()) == 1
    assert len(processes_with(str(rig.run))) == 1
    for directory in directories:
        assert files(directory) == files(images.base_tree)
        rig.umount(directory)
    rig.assert_nothing_left()


@pytest.mark.parametrize(
    "wrong", [("--trace", "t", "base"), ("--pull", "far", "--dry-run", "base")], ids=" ".join
)
def test_options_that_do_not_fit_are_wrong_usage(
    host: StoreDirectory, tmp_path: Path, wrong: tuple[str, ...]
) -> None:
    result = host.cli("mount", *wrong, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "--pull" in result.stderr


# --- pull= ---


def test_a_server_pulls_what_a_client_opens(
    serve: Servers, host: StoreDirectory, far: Far, images: Images
) -> None:
    server = serve("pull=far", metrics=True)
    assert names(host) == []
    far.link.counters(reset=True)
    server.client(READ, "base", "0")
    assert far.link.counters().requests == 2  # the root document, and a frame
    assert names(host) == ["base"]
    assert server.read("base") == images.base.read_bytes()


def test_a_server_s_image_need_not_be_here_and_is_the_default_export(
    serve: Servers, host: StoreDirectory, images: Images
) -> None:
    server = serve("image=base", "pull=far")
    assert server.read("") == images.base.read_bytes()
    server.expect_log("no image named 'other'")
    assert server.client(REFUSED, "other")
    assert names(host) == ["base"]


def test_clients_that_open_an_image_at_once_pull_it_once(
    serve: Servers, host: StoreDirectory, far: Far
) -> None:
    server = serve("pull=far", metrics=True)
    far.link.shape(0.05, 1e9)
    far.link.counters(reset=True)
    server.client(
        "threads = [threading.Thread(target=connect) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()",
        "base",
    )
    far.link.shape(0, 1e9)
    assert far.link.counters().requests <= 2
    assert names(host) == ["base"]


def test_an_image_that_the_remote_has_not_is_refused_and_others_go_on(
    serve: Servers, host: StoreDirectory, images: Images
) -> None:
    server = serve("pull=far")
    server.expect_log("no image named 'nope'")
    assert server.client(REFUSED, "nope")
    assert server.read("base") == images.base.read_bytes()
    assert names(host) == ["base"]


def test_a_server_of_a_remote_that_is_not_known_does_not_start(host: StoreDirectory) -> None:
    line = host.refuse("serve", "--pull", "nowhere", "--socket", host.path.parent / "s")
    assert "nowhere" in line
