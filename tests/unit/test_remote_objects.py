"""Reading and writing objects: mirrors, tries, bounds, conditions, and what failures say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupstore.errors import (
    DedupError,
    RemoteConflictError,
    RemoteDamagedError,
    RemoteError,
    RemoteNotFoundError,
    UsageError,
)
from dedupstore.remote import bucket, objects
from dedupstore.remote.objects import Objects, check_url, without_credentials
from tests.conftest import in_threads
from tests.httpserver import Handler, ObjectServer, object_server

DATA = bytes(range(256)) * 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(objects, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(objects, "BACKOFF_SECONDS_MAX", 0.002)


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with object_server() as running:
        running.objects["x"] = DATA
        yield running


@pytest.fixture
def s3(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """An s3:// URL that leads to `server`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return "s3://bucket/below"


def directory(tmp_path: Path, name: str, data: bytes = DATA) -> str:
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").write_bytes(data)
    return str(tmp_path / name)


def one_line(error: DedupError) -> str:
    assert str(error).isprintable()
    return str(error)


@pytest.fixture
def nobody() -> str:
    """A URL at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


# --- URLs ---


def test_urls_of_every_kind_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_url("here/there") == str(tmp_path / "here/there")
    for url in ("s3://b/p", "gs://b", "az://a/c/p", "https://h/p", "file:///d", "/d"):
        assert check_url(url) == url


@pytest.mark.parametrize(
    "url", ["", "ftp://h/p", "s3://", "file://host/d", "file:d//", "https://h/p?token=1", "x://"]
)
def test_other_urls_are_wrong_usage(url: str) -> None:
    if url == "file:d//":  # is a path
        return
    with pytest.raises(UsageError):
        check_url(url)


def test_credentials_in_a_url_are_never_shown(nobody: str) -> None:
    secret = nobody.replace("//", "//me:password@")
    assert without_credentials(f"{secret}/p") == f"{nobody}/p"
    with pytest.raises(RemoteError) as caught:
        Objects([secret]).read("x", 9)
    assert "password" not in one_line(caught.value)


# --- reading ---


def test_a_range_comes_from_a_directory_a_server_and_a_bucket(
    tmp_path: Path, server: ObjectServer, s3: str
) -> None:
    server.objects["bucket/below/x"] = DATA
    for url in (directory(tmp_path, "d"), f"file://{tmp_path}/d", server.url, s3):
        assert Objects([url]).read_range("x", 1000, 300) == DATA[1000:1300]
        assert Objects([url]).read("x", len(DATA)) == DATA


def test_the_next_mirror_is_asked_when_one_cannot_be_reached(tmp_path: Path, nobody: str) -> None:
    mirrored = Objects([nobody, directory(tmp_path, "d")])
    assert mirrored.read_range("x", 5, 5) == DATA[5:10]


def test_a_mirror_that_failed_is_asked_last_for_a_while(
    server: ObjectServer, tmp_path: Path
) -> None:
    server.answers = [lambda handler: handler.answer(503)]
    mirrored = Objects([server.url, directory(tmp_path, "d")])
    for _ in range(5):
        assert mirrored.read_range("x", 5, 5) == DATA[5:10]
    assert len(server.asked) == 1


def test_a_mirror_that_recovers_is_asked_again(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "AVOID_SECONDS", 0)
    server.answers = [lambda handler: handler.answer(503)]
    mirrored = Objects([server.url, directory(tmp_path, "d")])
    for _ in range(3):
        mirrored.read_range("x", 5, 5)
    assert len(server.asked) == 3


def test_the_next_mirror_is_asked_when_the_bytes_are_wrong(tmp_path: Path) -> None:
    lying = bytes(len(DATA))
    mirrored = Objects([directory(tmp_path, "lies", lying), directory(tmp_path, "d")])

    def accept(data: bytes) -> None:
        if not any(data):
            raise RemoteDamagedError("zeros")

    assert mirrored.read_range("x", 5, 5, accept) == DATA[5:10]
    assert mirrored.read("x", len(DATA), accept) == DATA
    with pytest.raises(RemoteDamagedError, match=r"lies: zeros"):
        Objects([str(tmp_path / "lies")]).read_range("x", 5, 5, accept)


def test_the_next_mirror_is_asked_for_what_one_has_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    mirrored = Objects([str(tmp_path / "empty"), directory(tmp_path, "d")])
    assert mirrored.read("x", len(DATA)) == DATA
    with pytest.raises(RemoteNotFoundError, match="has no y"):
        mirrored.read("y", 9)


def test_not_there_is_only_said_when_every_mirror_says_so(tmp_path: Path, nobody: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RemoteError, match="cannot be reached") as caught:
        Objects([str(tmp_path / "empty"), nobody]).read("x", 9)
    assert not isinstance(caught.value, RemoteNotFoundError)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_may_go_better_is_tried_again(server: ObjectServer, status: int) -> None:
    server.answers = [lambda handler: handler.answer(status)] * 3
    assert Objects([server.url]).read_range("x", 5, 5) == DATA[5:10]
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_is_final_is_not_tried_again(server: ObjectServer, status: int) -> None:
    server.answers = [lambda handler: handler.answer(status)]
    with pytest.raises(RemoteError) as caught:
        Objects([server.url]).read_range("x", 5, 5)
    assert isinstance(caught.value, RemoteNotFoundError) == (status == 404)
    assert server.url in one_line(caught.value)
    assert len(server.asked) == 1


def test_a_body_that_ends_early_is_asked_for_again(server: ObjectServer) -> None:
    head = {"Content-Range": f"bytes 5-9/{len(DATA)}"}
    server.answers = [lambda handler: handler.answer(206, data=DATA[5:7], headers=head, length=5)]
    assert Objects([server.url]).read_range("x", 5, 5) == DATA[5:10]
    assert len(server.asked) == 2
    server.answers = [lambda handler: handler.answer(200, data=DATA[:7], length=len(DATA))]
    assert Objects([server.url]).read("x", len(DATA)) == DATA


def test_an_object_that_is_too_short_or_too_long_is_damaged(tmp_path: Path) -> None:
    there = Objects([directory(tmp_path, "d")])
    with pytest.raises(RemoteDamagedError, match=f"ends at byte {len(DATA)}"):
        there.read_range("x", len(DATA) - 5, 10)
    with pytest.raises(RemoteDamagedError, match="more than"):
        there.read("x", len(DATA) - 1)


def test_a_server_that_never_answers_is_given_up_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objects, "TRY_SECONDS", 0.5)
    monkeypatch.setitem(bucket._READING, "read_timeout", "300ms")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(RemoteError, match="does not answer in time"):
            Objects([url]).read_range("x", 5, 5)
        assert time.monotonic() - begun < 20  # far less than one try's own limit


def test_other_threads_run_while_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "TRIES_MAX", 1)
    monkeypatch.setitem(bucket._READING, "read_timeout", "300ms")
    turns = 0

    def work(number: int) -> None:
        nonlocal turns
        if number:
            with pytest.raises(RemoteError):
                Objects([url]).read_range("x", 5, 5)
            return
        for _ in range(50):
            time.sleep(0.001)
            turns += 1
        assert turns == 50

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        in_threads(4, work)


def test_many_threads_share_one_connection_pool(server: ObjectServer) -> None:
    shared = Objects([server.url])

    def work(number: int) -> None:
        for at in range(number, number + 40):
            assert shared.read_range("x", at, 5) == DATA[at : at + 5]

    in_threads(8, work)
    assert len(server.asked) == 320


def test_nothing_is_opened_before_it_is_needed_so_a_fork_may_come_first() -> None:
    script = """
import os, sys
from dedupstore.remote.remote import Remote
remote = Remote(1, "r", ["http://127.0.0.1:1"])
assert "obstore" not in sys.modules
assert len(os.listdir("/proc/self/task")) == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- writing ---


@pytest.fixture(params=["directory", "bucket"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """Objects that can be written: of a directory, or of a server that keeps no conditions."""
    if request.param == "directory":
        made = Objects([str(tmp_path / "new")])
        made.prepare()
        return made
    return Objects([request.getfixturevalue("s3")])


def test_what_was_put_is_read(written: Objects) -> None:
    written.put("packs/aa/bb", DATA)
    written.put("packs/aa/bb", DATA)
    assert written.read("packs/aa/bb", len(DATA)) == DATA
    written.delete("packs/aa/bb")
    written.delete("packs/aa/bb")
    with pytest.raises(RemoteNotFoundError):
        written.read("packs/aa/bb", 9)


def test_a_directory_keeps_conditions(tmp_path: Path) -> None:
    made = Objects([str(tmp_path)])
    made.create("a/b", b"one")
    with pytest.raises(RemoteConflictError, match="another"):
        made.create("a/b", b"two")
    found = made.read_version("a/b", 9)
    assert found is not None
    made.replace("a/b", b"two", found[1])
    with pytest.raises(RemoteConflictError):
        made.replace("a/b", b"three", found[1])
    with pytest.raises(RemoteConflictError):
        made.delete_version("a/b", found[1])
    found = made.read_version("a/b", 9)
    assert found is not None
    made.delete_version("a/b", found[1])
    assert made.read_version("a/b", 9) is None
    with pytest.raises(RemoteConflictError):
        made.replace("a/b", b"three", found[1])
    assert [one.path for one in made.list("a/")] == []


def test_of_many_that_create_or_replace_at_once_one_wins(tmp_path: Path) -> None:
    made = Objects([str(tmp_path)])
    won: list[int] = []

    def create(number: int) -> None:
        try:
            Objects([str(tmp_path)]).create("doc", b"%d" % number)
            won.append(number)
        except RemoteConflictError:
            pass

    in_threads(8, create)
    assert made.read("doc", 9) == b"%d" % won[0]
    assert len(won) == 1
    found = made.read_version("doc", 9)
    assert found is not None
    version = found[1]
    won.clear()

    def replace(number: int) -> None:
        try:
            Objects([str(tmp_path)]).replace("doc", b"r%d" % number, version)
            won.append(number)
        except RemoteConflictError:
            pass

    in_threads(8, replace)
    assert made.read("doc", 9) == b"r%d" % won[0]
    assert len(won) == 1


def test_a_write_whose_answer_was_lost_is_recognised(server: ObjectServer, s3: str) -> None:
    """The server wrote, and the connection broke before it could say so: the next try is told that
    there is an object already, which is our own."""
    server.conditional = True

    def write_and_break(handler: Handler) -> bool:
        server.objects["bucket/below/doc"] = b"ours"
        return handler.answer(500)

    server.answers = [write_and_break]
    Objects([s3]).create("doc", b"ours")
    server.answers = [write_and_break]
    with pytest.raises(RemoteConflictError):
        Objects([s3]).create("doc", b"mine")


def test_a_listing_has_paths_sizes_and_times(tmp_path: Path) -> None:
    made = Objects([str(tmp_path)])
    for path in ("a/b/c", "a/a", "b/x"):
        made.put(path, path.encode())
    assert [(one.path, one.size) for one in made.list("a/")] == [("a/a", 3), ("a/b/c", 5)]
    assert abs(made.list("a/")[0].written.timestamp() - time.time()) < 60
    assert made.list("none/") == []


def test_nothing_half_written_is_ever_listed_or_kept(tmp_path: Path) -> None:
    made = Objects([str(tmp_path)])
    made.prepare()
    (tmp_path / "tmp").mkdir()
    left, young = tmp_path / "tmp" / "left", tmp_path / "tmp" / "young"
    left.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(left, (0, 0))
    made.probe("probes/x")
    assert not left.exists()
    assert young.exists()
    assert made.list("probes/") == []


def test_a_store_that_does_not_keep_conditions_is_refused(server: ObjectServer, s3: str) -> None:
    with pytest.raises(RemoteError, match="If-None-Match"):
        Objects([s3]).probe("probes/x")
    assert "bucket/below/probes/x" not in server.objects
    server.conditional = True
    Objects([s3]).probe("probes/x")
    assert "bucket/below/probes/x" not in server.objects


def test_an_http_server_is_for_reading(server: ObjectServer) -> None:
    with pytest.raises(RemoteError, match="for reading"):
        Objects([server.url]).probe("probes/x")
    with pytest.raises(RemoteError, match="does not list"):
        Objects([server.url]).list("images/")
    assert server.asked == []


def test_a_directory_that_cannot_be_written_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "packs").write_bytes(b"a file")
    with pytest.raises(RemoteError) as caught:
        Objects([str(tmp_path)]).put("packs/aa/b", DATA)
    assert str(tmp_path) in one_line(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/x", "az://account/x", "gs://bucket/x"])
def test_what_has_no_credentials_fails_in_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(objects, "TRIES_MAX", 1)
    with pytest.raises(RemoteError) as caught:
        Objects([url]).read("x", 9)
    assert url in one_line(caught.value)
