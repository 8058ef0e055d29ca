"""Pushing to remotes, and collecting their garbage: in a directory, and in real servers of S3's and
Azure's protocol."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.errors import (
    ChunkDamagedError,
    RemoteConflictError,
    RemoteError,
    RemoteNotFoundError,
    UsageError,
)
from dedupstore.frames import Codecs
from dedupstore.imported import Imported
from dedupstore.remote import layout, packs
from dedupstore.remote.collecting import RemoteCollected, collect_remote
from dedupstore.remote.configuration import add_remote, find_remote
from dedupstore.remote.manifests import frames_of
from dedupstore.remote.objects import Found
from dedupstore.remote.pushing import stored_record
from dedupstore.remote.remote import Remote, open_frame
from dedupstore.remote.roots import unpack_trace
from dedupstore.store import Store
from dedupstore.traces import make_trace
from tests.conftest import GRID, flipped, import_bytes, keys_of, noise, read_image, silent, text
from tests.interop.objectstores import ObjectServer, azurite, seaweedfs
from tests.lazy import Asked, asked
from tests.remotes import (
    assert_whole,
    bundle_files,
    collect,
    image_bytes,
    make_old,
    pack_files,
    push,
)

Add = Callable[[str, bytes], Imported]

BASE = noise(1, 300_000) + bytes(100_000) + text(2, 500_000)
LONG = noise(4, 2_000_000)  # of many frames
DERIVED = BASE[: 50 * GRID] + noise(3, 40 * GRID) + BASE[50 * GRID :]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(params=["directory", "s3", "azure"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a remote may be made."""
    if request.param == "directory":
        return str(tmp_path / "remote")
    server: ObjectServer = request.getfixturevalue(f"{request.param}_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"{server.bucket}/{tmp_path.name}"


@pytest.fixture
def remote(store: Store, url: str) -> Remote:
    return add_remote(store.env, "r", [url])


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> Path:
    """A remote `r` in a directory, whose files tests may hurt."""
    add_remote(store.env, "r", [str(tmp_path / "folder")])
    return tmp_path / "folder"


def found(store: Store) -> Remote:
    return find_remote(store.env, "r")[0]


# --- what a push sends ---


def test_a_pushed_image_is_read_back_byte_for_byte(store: Store, add: Add, remote: Remote) -> None:
    imported = add("lib/base:1", BASE)
    pushed = push(store, "r", "lib/base:1")
    assert (pushed.new_bytes, pushed.new_chunks) == (imported.unique_bytes, imported.new_chunks)
    assert image_bytes(remote, "lib/base:1") == BASE
    root = remote.root("lib/base:1")
    assert (root.size, root.kind, root.digest) == (len(BASE), fmt.KIND_RAW, imported.digest)
    assert [one.name for one in remote.roots()] == ["lib/base:1"]


@pytest.mark.parametrize("data", [b"", bytes(1_000_000), b"x"], ids=["empty", "zeros", "byte"])
def test_images_with_hardly_any_chunks(store: Store, add: Add, remote: Remote, data: bytes) -> None:
    add("odd", data)
    push(store, "r", "odd")
    assert image_bytes(remote, "odd") == data


def test_what_the_remote_has_is_not_sent(store: Store, add: Add, remote: Remote) -> None:
    add("base", BASE)
    derived = add("derived", DERIVED)
    store.clone("base", "clone")
    push(store, "r", "base")
    assert push(store, "r", "base").sent_bytes == 0
    clone = push(store, "r", "clone")
    assert (clone.packs, clone.new_bytes) == (0, 0)
    assert clone.sent_bytes < 2000
    pushed = push(store, "r", "derived")
    assert pushed.new_bytes == derived.new_bytes
    assert pushed.sent_bytes <= 1.05 * derived.stored_bytes
    for name, data in (("base", BASE), ("clone", BASE), ("derived", DERIVED)):
        assert image_bytes(remote, name) == data


def test_another_host_sends_only_what_the_remote_has_not(
    store: Store, add: Add, remote: Remote, url: str, tmp_path: Path
) -> None:
    add("base", BASE)
    push(store, "r", "base")
    with Store.create(tmp_path / "other") as other:
        add_remote(other.env, "r", [url])
        # Its frames hold chunks that the remote has beside some that it has not.
        import_bytes(other, tmp_path, "derived", DERIVED)
        pushed = push(other, "r", "derived")
        assert 40 * GRID <= pushed.new_bytes < 60 * GRID
        assert pushed.sent_bytes < 1.05 * pushed.new_bytes
    assert image_bytes(remote, "derived") == DERIVED
    assert image_bytes(remote, "base") == BASE


def test_frames_go_with_their_slots_and_are_told_of(store: Store, add: Add, folder: Path) -> None:
    add("base", BASE)
    codecs = Codecs()
    told = {}
    push(store, "r", "base", on_sent=lambda frame, *place: told.update({frame: place}))
    assert {fmt.frame_key(frame) for frame in told} == set(keys_of(store, "frames"))
    for frame, (pack, offset, length) in told.items():
        local = stored_record(store.env, store.fetcher, frame)
        there = (folder / layout.pack_path(pack)).read_bytes()[offset : offset + length]
        heads = [fmt.decode_frame_header(record, frame) for record in (there, local)]
        assert heads[0].slots == heads[1].slots
        assert codecs.decode(there, frame) == codecs.decode(local, frame)
        fmt.verify_frame(there, packs.FRAME_SEED)
    again = []
    store.clone("base", "clone")
    push(store, "r", "clone", on_sent=lambda frame, *_: again.append(frame))
    assert sorted(again) == sorted(told)


def test_frames_with_reclaimed_chunks_are_packed_anew(
    store: Store, add: Add, remote: Remote
) -> None:
    """Their slots would not all be present."""
    add("base", BASE)
    part = BASE[: 4096 * 20] + bytes(4096) + BASE[4096 * 45 : 4096 * 60]
    add("part", part)
    store.remove(["base"])
    assert store.collect_garbage().chunks
    told: list[int] = []
    push(store, "r", "part", on_sent=lambda frame, *_: told.append(frame))
    assert image_bytes(remote, "part") == part
    assert len(told) < len(keys_of(store, "frames"))


def test_what_is_loaded_may_come_from_elsewhere(store: Store, add: Add, remote: Remote) -> None:
    add("base", BASE)
    asked = []

    def load(frame: int) -> bytes:
        asked.append(frame)
        return stored_record(store.env, store.fetcher, frame)

    push(store, "r", "base", load=load)
    assert {fmt.frame_key(frame) for frame in asked} == set(keys_of(store, "frames"))
    assert len(asked) == len(set(asked))


def test_a_frame_that_cannot_be_loaded_ends_the_push_and_leaves_no_image(
    store: Store, add: Add, remote: Remote
) -> None:
    add("base", BASE)

    def load(frame: int) -> bytes:
        raise ChunkDamagedError(frame, "is gone")

    told: list[int] = []
    with pytest.raises(ChunkDamagedError):
        push(store, "r", "base", load=load, on_sent=lambda frame, *_: told.append(frame))
    assert remote.roots() == []
    assert told == []
    push(store, "r", "base")
    assert image_bytes(remote, "base") == BASE


@pytest.mark.damaged
def test_chunks_that_are_lost_here_are_only_needed_if_the_remote_lacks_them(
    store: Store, add: Add, remote: Remote
) -> None:
    add("base", BASE)
    store.clone("base", "clone")
    lose_first_frame(store)
    with pytest.raises(ChunkDamagedError, match="not in the store"):
        push(store, "r", "base")
    assert remote.roots() == []
    add("again", BASE)
    push(store, "r", "again")
    push(store, "r", "clone")
    assert image_bytes(remote, "clone") == BASE


def lose_first_frame(store: Store) -> None:
    """What a repair leaves of a damaged frame: its slots, absent, and lost records."""
    key = keys_of(store, "frames")[0]
    frame = fmt.decode_frame_key(key)
    with store.env.write() as txn:
        header = fmt.decode_frame_header(txn.get(key, db=store.env.frames), frame)
        absent = bytearray(16)
        absent[10:12] = len(header.slots).to_bytes(2, "little")
        for slot in header.slots:
            absent += slot.digest + (slot.length | fmt.SLOT_ABSENT << 30).to_bytes(4, "little")
            txn.delete(slot.digest, db=store.env.chunks)
        fmt.seal_frame(absent, frame)
        txn.put(key, bytes(absent), db=store.env.frames)


def test_the_image_stays_here_while_it_is_pushed(store: Store, add: Add, remote: Remote) -> None:
    add("base", BASE)

    first = threading.Lock()

    def load(frame: int) -> bytes:
        if first.acquire(blocking=False):
            store.remove(["base"])
        assert store.collect_garbage().chunks == 0
        return stored_record(store.env, store.fetcher, frame)

    push(store, "r", "base", load=load)
    assert image_bytes(remote, "base") == BASE
    assert store.collect_garbage().chunks > 0


# --- names ---


def test_another_image_of_that_name_is_only_replaced_on_request(
    store: Store, add: Add, remote: Remote
) -> None:
    add("a", BASE)
    push(store, "r", "a")
    store.rename("a", "old")
    add("a", DERIVED)
    with pytest.raises(RemoteConflictError, match="--replace"):
        push(store, "r", "a")
    assert image_bytes(remote, "a") == BASE
    push(store, "r", "a", replace=True)
    assert image_bytes(remote, "a") == DERIVED


def loading(store: Store, first: Callable[[], object]) -> Callable[[int], bytes]:
    """Loads frames for a push, in the middle of which, once, something else is done."""
    lock = threading.Lock()

    def load(frame: int) -> bytes:
        if lock.acquire(blocking=False):
            first()
        return stored_record(store.env, store.fetcher, frame)

    return load


def test_a_name_that_another_took_meanwhile_is_not_overwritten(
    store: Store, add: Add, remote: Remote, url: str, tmp_path: Path
) -> None:
    add("a", BASE)
    with Store.create(tmp_path / "other") as other:
        add_remote(other.env, "r", [url])
        import_bytes(other, tmp_path, "a", noise(9, 50_000))
        load = loading(store, lambda: push(other, "r", "a"))
        with pytest.raises(RemoteConflictError, match="somebody else"):
            push(store, "r", "a", load=load)
    assert image_bytes(remote, "a") == noise(9, 50_000)


def test_a_name_that_changed_since_it_was_looked_at_is_not_replaced(
    store: Store, add: Add, remote: Remote, url: str, tmp_path: Path
) -> None:
    add("a", BASE)
    push(store, "r", "a")
    store.rename("a", "old")
    add("a", DERIVED)
    with Store.create(tmp_path / "other") as other:
        add_remote(other.env, "r", [url])
        import_bytes(other, tmp_path, "a", noise(9, 50_000))
        load = loading(store, lambda: push(other, "r", "a", replace=True))
        with pytest.raises(RemoteConflictError, match="somebody else"):
            push(store, "r", "a", load=load, replace=True)
    assert image_bytes(remote, "a") == noise(9, 50_000)
    push(store, "r", "a", replace=True)
    assert image_bytes(remote, "a") == DERIVED


def test_a_deleted_image_is_gone_and_can_be_pushed_again(
    store: Store, add: Add, remote: Remote
) -> None:
    add("a", BASE)
    push(store, "r", "a")
    remote.delete_root("a")
    assert remote.roots() == []
    with pytest.raises(RemoteNotFoundError, match="no image named 'a'"):
        remote.root("a")
    with pytest.raises(RemoteNotFoundError):
        remote.delete_root("a")
    assert push(store, "r", "a").packs == 0
    assert image_bytes(remote, "a") == BASE


# --- gc ---


def test_gc_condemns_first_and_deletes_a_grace_period_later(
    store: Store, add: Add, remote: Remote
) -> None:
    add("a", BASE)
    add("b", noise(7, 400_000))
    push(store, "r", "a")
    push(store, "r", "b")
    remote.delete_root("b")
    wait_for_the_remote_s_clock()
    young = collect(remote, 3600)
    assert (young.condemned, young.deleted, young.young) == (0, 0, 2)
    promised = collect(remote, dry_run=True)
    assert (promised.condemned, promised.deleted) == (2, 0)
    assert remote.condemned() == {}
    condemned = collect(remote)
    assert (condemned.condemned, condemned.deleted, condemned.images) == (2, 0, 1)
    assert 400_000 < condemned.condemned_bytes < 420_000
    wait_for_the_remote_s_clock()
    waiting = collect(remote, 3600)
    assert (waiting.condemned, waiting.deleted, waiting.young) == (0, 0, 0)
    deleted = collect(remote)
    assert (deleted.condemned, deleted.deleted) == (0, 2)
    assert deleted.deleted_bytes == condemned.condemned_bytes
    assert remote.condemned() == {}
    assert assert_whole(remote) == ["a"]
    assert push(store, "r", "b").new_bytes == 400_000
    assert image_bytes(remote, "b") == noise(7, 400_000)


def wait_for_the_remote_s_clock() -> None:
    """Object stores know when to a second."""
    time.sleep(1.1)


def test_gc_refuses_a_grace_period_that_pushes_cannot_rely_on(store: Store, folder: Path) -> None:
    with pytest.raises(UsageError, match="--force"):
        collect_remote(found(store), grace_seconds=599, on_progress=silent)
    collect_remote(found(store), grace_seconds=600, on_progress=silent)


def test_a_condemned_pack_that_is_needed_again_stays(store: Store, add: Add, folder: Path) -> None:
    """A push looked before the gc condemned, and wrote its root document after."""
    add("a", BASE)
    push(store, "r", "a")
    remote = found(store)
    root, _ = remote.root_version("a")
    assert root is not None
    remote.delete_root("a")
    assert collect(remote).condemned == 2
    remote.put_root(root, None)
    kept = collect(remote)
    assert (kept.deleted, kept.condemned) == (0, 0)
    assert remote.condemned() == {}
    assert image_bytes(remote, "a") == BASE


def test_a_condemned_pack_counts_as_absent_for_a_push(store: Store, add: Add, folder: Path) -> None:
    add("a", BASE)
    push(store, "r", "a")
    remote = found(store)
    remote.delete_root("a")
    collect(remote)
    assert push(store, "r", "a").new_bytes > 0
    collect(remote)
    assert image_bytes(remote, "a") == BASE


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_pack_that_a_gc_takes_from_under_a_push_is_sent_again(
    store: Store, add: Add, folder: Path, rounds: int
) -> None:
    """Condemned, or condemned and deleted, between the push's look and its end."""
    add("a", BASE)
    push(store, "r", "a")
    add("b", DERIVED)
    remote = found(store)
    remote.delete_root("a")
    collected: list[RemoteCollected] = []
    first = threading.Lock()

    def load(frame: int) -> bytes:
        if first.acquire(blocking=False):
            collected.extend(collect(remote) for _ in range(rounds))
        return stored_record(store.env, store.fetcher, frame)

    pushed = push(store, "r", "b", load=load)
    assert pushed.new_bytes > 0
    assert collected[0].condemned == 2
    for _ in range(2):
        collect(remote)
    assert image_bytes(remote, "b") == DERIVED
    assert assert_whole(remote) == ["b"]


def test_own_packs_that_vanish_are_sent_again_and_not_forever(
    store: Store, add: Add, folder: Path
) -> None:
    add("a", BASE)
    remote = found(store)
    real, calls = Remote.packs, 0

    def vanish(times: int) -> Callable[[Remote], dict[bytes, Found]]:
        def packs(self: Remote) -> dict[bytes, Found]:
            nonlocal calls
            calls += 1
            if calls <= times:
                for path in pack_files(folder):
                    path.unlink()
            return real(self)

        return packs

    def push_through(times: int) -> None:
        nonlocal calls
        calls = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Remote, "packs", vanish(times))
            push(store, "r", "a")

    push_through(3)
    assert image_bytes(remote, "a") == BASE
    remote.delete_root("a")
    with pytest.raises(RemoteError, match="vanish"):
        push_through(100)
    assert remote.roots() == []


@pytest.mark.parametrize("hurt", ["manifest", "root"])
def test_gc_deletes_nothing_when_it_cannot_tell_what_is_needed(
    store: Store, add: Add, folder: Path, hurt: str
) -> None:
    add("a", BASE)
    add("b", noise(7, 400_000))
    push(store, "r", "a")
    push(store, "r", "b")
    remote = found(store)
    path = folder / (layout.image_path("a"))
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, 8 * whole.index(b"dedupMAN") if hurt == "manifest" else 5))
    remote.delete_root("b")
    with pytest.raises(RemoteError, match="delete"):
        collect(remote)
    assert remote.condemned() == {}
    remote.delete_root("a")
    assert collect(remote).condemned == 4


# --- bundles of indexes ---


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushes write many packs."""
    monkeypatch.setattr("dedupstore.remote.sending.PACK_BYTES", 50_000)


@pytest.fixture
def another(url: str, tmp_path: Path) -> Iterator[Store]:
    """The store of another host, which knows the remote."""
    with Store.create(tmp_path / "another") as other:
        add_remote(other.env, "r", [url])
        yield other


def below(folder: str, remote: Asked) -> list[str]:
    """The objects that were read, by request."""
    return [path for path, _, _ in remote.reads if path.startswith(folder)]


def pulled(store: Store, name: str) -> bytes:
    """An image's bytes, after a pull of what it is made of."""
    store.pull("r", name, name, silent, lazy=True)
    return read_image(store, name)


in_directory = pytest.mark.parametrize("url", ["directory"], indirect=True)


@pytest.mark.usefixtures("small_packs")
def test_a_push_bundles_the_indexes_of_the_packs_it_wrote(
    store: Store, add: Add, remote: Remote
) -> None:
    add("a", LONG)
    pushed = push(store, "r", "a")
    manifest = remote.manifest(remote.root("a"))
    (bundle,) = manifest.bundles
    assert list(remote.bundles()) == [bundle.bundle]
    entries = packs.decode_bundle(remote.bundle(bundle.bundle, bundle.length), bundle.bundle)
    assert len(entries) == pushed.packs > 5
    assert {entry.pack for entry in entries} == set(remote.packs())
    assert pushed.sent_bytes == sum(
        one.size
        for folder in ("packs/", "indexes/", "manifests/", "images/")
        for one in remote.objects.list(folder)
    )


@in_directory
@pytest.mark.usefixtures("small_packs")
def test_a_lazy_pull_reads_the_root_document_and_nothing_else(
    store: Store, add: Add, remote: Remote, another: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", BASE)
    add("derived", DERIVED)
    push(store, "r", "base")
    push(store, "r", "derived")
    for name, data in (("derived", DERIVED), ("base", BASE)):
        with asked(monkeypatch) as requests:
            another.pull("r", name, name, silent, lazy=True)
        assert [path for path, _, _ in requests.reads] == [layout.image_path(name)]
        assert read_image(another, name) == data


@in_directory
@pytest.mark.usefixtures("small_packs")
def test_a_small_change_of_a_large_image_leaves_the_indexes_of_that_in_its_bundle(
    store: Store, add: Add, remote: Remote, another: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dedupstore.remote.pushing._CARRIED_BYTES", 1000)
    monkeypatch.setattr("dedupstore.remote.pushing._CARRIED_PARTS", 1000)
    add("base", BASE)
    add("derived", DERIVED)
    push(store, "r", "base")
    (of_base,) = remote.bundles()
    push(store, "r", "derived")
    root = remote.root("derived")
    assert root.parts is not None
    carried = packs.decode_indexes(root.parts.indexes)
    needed = remote.manifest(root).packs
    assert 0 < len(carried) < len(needed)
    with asked(monkeypatch) as requests:
        another.pull("r", "derived", "derived", silent, lazy=True)
    assert below("indexes/", requests) == [layout.bundle_path(of_base)]
    assert below("packs/", requests) == []
    assert read_image(another, "derived") == DERIVED


@in_directory
@pytest.mark.usefixtures("small_packs")
def test_an_image_gets_its_trace_later_and_keeps_its_indexes(
    store: Store, add: Add, remote: Remote, another: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dedupstore.remote.pushing._CARRIED_BYTES", 0)
    monkeypatch.setattr("dedupstore.remote.pushing._CARRIED_PARTS", 10)
    add("a", LONG)
    push(store, "r", "a")
    trace = make_trace(
        bytes(32), [(slot.digest, slot.length) for slot in slots_of(remote, "a")[:3]]
    )
    pushed = push(store, "r", "a", trace=trace)
    assert (pushed.packs, pushed.new_bytes) == (0, 0)
    assert push(store, "r", "a", trace=trace).sent_bytes == 0
    root = remote.root("a")
    assert root.parts is not None
    assert unpack_trace(root.parts.trace) == trace
    with asked(monkeypatch) as requests:
        another.pull("r", "a", "a", silent, lazy=True)
    assert [path for path, _, _ in requests.reads] == [layout.image_path("a")]


def slots_of(remote: Remote, name: str) -> list[fmt.Slot]:
    """The chunks of an image, in the order of its frames."""
    manifest = remote.manifest(remote.root(name))
    frames = frames_of(manifest, remote.indexes(manifest))
    return [slot for _, frame in frames for slot in frame.header.slots]


@in_directory
@pytest.mark.usefixtures("small_packs")
def test_a_push_from_another_host_reads_bundles_and_no_index_of_a_pack(
    store: Store,
    add: Add,
    remote: Remote,
    another: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add("base", BASE)
    push(store, "r", "base")
    import_bytes(another, tmp_path, "derived", DERIVED)
    (bundle,) = remote.bundles()
    with asked(monkeypatch) as requests:
        push(another, "r", "derived")
    assert below("indexes/", requests) == [layout.bundle_path(bundle)]
    assert below("packs/", requests) == []
    manifest = remote.manifest(remote.root("derived"))
    assert {ref.bundle for ref in manifest.bundles} == set(remote.bundles())
    assert image_bytes(remote, "derived") == DERIVED


@pytest.mark.usefixtures("small_packs")
def test_a_bundle_is_closed_before_it_is_too_long(
    store: Store, add: Add, remote: Remote, another: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dedupstore.remote.contents._BUNDLE_BYTES", 1500)
    add("a", LONG)
    push(store, "r", "a")
    bundles = [
        packs.decode_bundle(remote.bundle(bundle, there.size), bundle)
        for bundle, there in remote.bundles().items()
    ]
    assert len(bundles) > 2
    assert {entry.pack for entries in bundles for entry in entries} == set(remote.packs())
    for entries in bundles:
        assert len(entries) == 1 or sum(entry.index_bytes for entry in entries) <= 1500
    assert pulled(another, "a") == LONG
    store.clone("a", "clone")
    push(store, "r", "clone")
    manifests = [remote.manifest(remote.root(name)) for name in ("a", "clone")]
    assert {ref.bundle for ref in manifests[0].bundles} == set(remote.bundles())
    assert manifests[0].packs == manifests[1].packs


@in_directory
@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("hurt", ["missing", "damaged", "short"])
def test_a_pull_without_its_bundle_reads_the_indexes_of_the_packs(
    store: Store,
    add: Add,
    remote: Remote,
    url: str,
    another: Store,
    monkeypatch: pytest.MonkeyPatch,
    hurt: str,
) -> None:
    add("a", LONG)
    push(store, "r", "a")
    make_old(remote, bundles=True)
    (bundle,) = bundle_files(Path(url))
    whole = bundle.read_bytes()
    bundle.write_bytes({"damaged": flipped(whole, 8 * len(whole) - 9)}.get(hurt, whole[:-9]))
    if hurt == "missing":
        bundle.unlink()
    with asked(monkeypatch) as requests:
        another.pull("r", "a", "a", silent, lazy=True)
    assert set(below("packs/", requests)) == set(map(layout.pack_path, remote.packs()))
    assert read_image(another, "a") == LONG


def test_gc_deletes_the_bundle_of_a_deleted_image_and_keeps_those_in_use(
    store: Store, add: Add, remote: Remote
) -> None:
    """The last image that shares a bundle takes it along."""
    add("base", BASE)
    push(store, "r", "base")
    (shared,) = remote.bundles()
    add("derived", DERIVED)
    push(store, "r", "derived")
    (own,) = remote.bundles().keys() - {shared}

    def left() -> set[bytes]:
        for _ in range(2):
            wait_for_the_remote_s_clock()
            collect(remote)
        assert assert_whole(remote) == [root.name for root in remote.roots()]
        return set(remote.bundles())

    remote.delete_root("base")
    assert left() == {shared, own}
    push(store, "r", "base")
    remote.delete_root("derived")
    assert left() == {shared}
    remote.delete_root("base")
    assert left() == set()
    assert remote.packs() == {}


@in_directory
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_condemned_bundle_counts_as_absent_for_a_push(
    store: Store, add: Add, remote: Remote, another: Store, when: str
) -> None:
    """What it has of packs that are not is put into a new one."""
    add("base", BASE)
    push(store, "r", "base")
    (old,) = remote.bundles()
    add("derived", DERIVED)
    first = threading.Lock()

    def condemn() -> None:
        document = layout.encode_condemned([layout.bundle_path(old)])
        remote.objects.create(layout.condemned_path(bytes(16)), document)

    def load(frame: int) -> bytes:
        if when == "meanwhile" and first.acquire(blocking=False):
            condemn()
        return stored_record(store.env, store.fetcher, frame)

    if when == "before":
        condemn()
    pushed = push(store, "r", "derived", load=load)
    assert pushed.new_bytes < len(DERIVED) - len(BASE) // 2
    manifest = remote.manifest(remote.root("derived"))
    (new,) = manifest.bundles
    assert new.bundle != old
    assert len(manifest.packs) == 2
    remote.delete_root("base")
    for _ in range(3):
        collect(remote)
    assert list(remote.bundles()) == [new.bundle]
    assert pulled(another, "derived") == DERIVED


@pytest.mark.usefixtures("small_packs")
def test_a_remote_of_before_there_were_bundles_is_read_added_to_and_collected(
    store: Store, add: Add, remote: Remote, another: Store, tmp_path: Path
) -> None:
    add("base", BASE)
    add("other", noise(7, 200_000))
    push(store, "r", "base")
    push(store, "r", "other")
    make_old(remote)
    old = set(remote.packs())
    assert remote.bundles() == {}
    assert remote.manifest(remote.root("base")).bundles == ()
    assert pulled(another, "base") == BASE

    # The push finds the old packs, and bundles their indexes with those of its own.
    import_bytes(another, tmp_path, "derived", DERIVED)
    assert push(another, "r", "derived").new_bytes < 60 * GRID
    manifest = remote.manifest(remote.root("derived"))
    (bundle,) = manifest.bundles
    raw = remote.bundle(bundle.bundle, bundle.length)
    bundled = {entry.pack for entry in packs.decode_bundle(raw, bundle.bundle)}
    assert bundled == {ref.pack for ref in manifest.packs}
    assert bundled & old
    assert bundled - old

    remote.delete_root("other")
    for _ in range(2):
        wait_for_the_remote_s_clock()
        collect(remote)
    assert list(remote.bundles()) == [bundle.bundle]
    assert old - set(remote.packs())
    assert assert_whole(remote) == ["base", "derived"]
    remote.delete_root("base")
    assert image_bytes(remote, "derived") == DERIVED


@pytest.mark.usefixtures("small_packs")
def test_a_remote_of_before_root_documents_had_manifests_is_read_added_to_and_collected(
    store: Store, add: Add, remote: Remote, another: Store, tmp_path: Path
) -> None:
    add("base", BASE)
    add("other", noise(7, 200_000))
    push(store, "r", "base")
    push(store, "r", "other")
    make_old(remote, bundles=True)
    manifests = remote.objects.list(layout.MANIFESTS)
    assert len(manifests) == 2
    assert [root.name for root in remote.roots()] == ["base", "other"]
    assert pulled(another, "base") == BASE
    assert push(another, "r", "base").sent_bytes == 0
    import_bytes(another, tmp_path, "derived", DERIVED)
    assert push(another, "r", "derived").new_bytes < 60 * GRID
    remote.delete_root("other")
    for _ in range(2):
        wait_for_the_remote_s_clock()
        collect(remote)
    (left,) = remote.objects.list(layout.MANIFESTS)
    assert left.path == layout.manifest_path(remote.root("base").manifest)
    assert assert_whole(remote) == ["base", "derived"]


@pytest.mark.parametrize("hurt", ["manifest", "indexes", "line"])
def test_a_damaged_root_document_is_replaced_by_the_next_push_if_it_tells_its_digest(
    store: Store, add: Add, folder: Path, hurt: str
) -> None:
    add("a", BASE)
    push(store, "r", "a")
    path = folder / layout.image_path("a")
    whole = path.read_bytes()
    at = {"manifest": whole.index(b"dedupMAN"), "indexes": whole.index(b"dedupIDX"), "line": 3}
    path.write_bytes(flipped(whole, 8 * at[hurt]))
    remote = found(store)
    with pytest.raises(RemoteError):
        remote.root("a")
    if hurt == "line":
        with pytest.raises(RemoteError, match="remote delete"):
            push(store, "r", "a")
        return
    assert [root.name for root in remote.roots()] == ["a"]
    assert push(store, "r", "a").packs == 0
    assert image_bytes(remote, "a") == BASE


@in_directory
@pytest.mark.parametrize("hurt", ["missing", "damaged"])
def test_a_push_without_a_bundle_reads_the_indexes_of_the_packs(
    store: Store,
    add: Add,
    remote: Remote,
    url: str,
    another: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hurt: str,
) -> None:
    """Its look may have listed one that a gc deletes before it is read."""
    add("base", BASE)
    push(store, "r", "base")
    import_bytes(another, tmp_path, "derived", DERIVED)
    (bundle,) = bundle_files(Path(url))
    listed = remote.bundles()
    bundle.write_bytes(flipped(bundle.read_bytes(), 900))
    if hurt == "missing":
        bundle.unlink()
        monkeypatch.setattr(Remote, "bundles", lambda _: listed)
    assert push(another, "r", "derived").new_bytes < 60 * GRID
    assert bundle.name not in {
        ref.bundle.hex() for ref in remote.manifest(remote.root("derived")).bundles
    }
    assert image_bytes(remote, "derived") == DERIVED


@in_directory
def test_a_pack_of_another_length_than_its_bundle_says_is_not_relied_on(
    store: Store, add: Add, remote: Remote, url: str, another: Store, tmp_path: Path
) -> None:
    add("base", BASE)
    push(store, "r", "base")
    import_bytes(another, tmp_path, "derived", DERIVED)
    (pack,) = pack_files(Path(url))
    pack.write_bytes(pack.read_bytes()[:-5000])
    with pytest.raises(RemoteError, match="trailer"):
        push(another, "r", "derived")
    assert [root.name for root in remote.roots()] == ["base"]


# --- derived data and damage ---


def cached(store: Store) -> list[Path]:
    return sorted(path for path in (store.path / "remotes").rglob("*") if path.is_file())


def names_of(files: list[Path]) -> list[str]:
    return sorted(path.name for path in files)


def test_bundles_are_kept_and_a_damaged_or_lost_one_is_read_again(
    store: Store, add: Add, folder: Path
) -> None:
    add("a", BASE)
    push(store, "r", "a")
    (bundle,) = cached(store)
    assert names_of([bundle]) == names_of(bundle_files(folder))
    kept = bundle.read_bytes()
    assert kept == bundle_files(folder)[0].read_bytes()
    for spoiled in (flipped(kept, 77), kept[:-5], b"", None):
        store.clone("a", "clone")
        bundle.unlink() if spoiled is None else bundle.write_bytes(spoiled)
        assert push(store, "r", "clone").packs == 0
        assert bundle.read_bytes() == kept
        found(store).delete_root("clone")
        store.remove(["clone"])


def test_indexes_of_packs_in_no_bundle_are_kept_and_a_damaged_or_lost_one_is_read_again(
    store: Store, add: Add, folder: Path
) -> None:
    add("a", BASE)
    push(store, "r", "a")
    make_old(found(store))
    (pack,) = pack_files(folder)
    index = cached(store)[0].with_name(pack.name)
    whole = pack.read_bytes()
    kept = whole[-16 - int.from_bytes(whole[-16:-12], "little") : -16]
    for spoiled in (None, flipped(kept, 77), kept[:-5], b""):
        store.clone("a", "clone")
        index.unlink(missing_ok=True) if spoiled is None else index.write_bytes(spoiled)
        assert push(store, "r", "clone").packs == 0
        assert index.read_bytes() == kept
        make_old(found(store))
        found(store).delete_root("clone")
        store.remove(["clone"])


def test_what_is_cached_spares_reading_bundles_and_packs(
    store: Store, add: Add, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("a", BASE)
    store.clone("a", "b")
    push(store, "r", "a")
    with asked(monkeypatch) as remote:
        assert push(store, "r", "b").packs == 0
    assert below("packs/", remote) == below("indexes/", remote) == []


def test_bundles_and_indexes_that_are_gone_are_forgotten(
    store: Store, add: Add, folder: Path
) -> None:
    add("a", BASE)
    add("b", noise(8, 100_000))
    push(store, "r", "a")
    make_old(found(store))
    store.clone("a", "clone")
    push(store, "r", "clone")
    assert names_of(cached(store)) == names_of([*bundle_files(folder), *pack_files(folder)])
    for name in ("a", "clone"):
        found(store).delete_root(name)
    for path in (*bundle_files(folder), *pack_files(folder)):
        path.unlink()
    push(store, "r", "b")
    assert names_of(cached(store)) == names_of(bundle_files(folder))


def test_an_index_longer_than_one_request_brings_is_read_whole(
    store: Store, add: Add, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dedupstore.remote.remote._INDEX_BYTES_LIKELY", 100)
    add("a", BASE)
    store.clone("a", "b")
    push(store, "r", "a")
    make_old(found(store))
    assert push(store, "r", "b").packs == 0


def test_a_remote_s_damage_is_refused_in_one_line(store: Store, add: Add, folder: Path) -> None:
    add("a", BASE)
    push(store, "r", "a")
    remote = found(store)
    root = remote.root("a")
    manifest = remote.manifest(root)
    for path in bundle_files(folder):
        path.unlink()
    (pack,) = pack_files(folder)
    whole = pack.read_bytes()
    pack.write_bytes(flipped(whole, 8 * (len(whole) - 40)))
    with pytest.raises(RemoteError, match="digest"):
        remote.indexes(manifest)
    pack.write_bytes(flipped(whole, 800))
    ((_, frame), *_) = frames_of(manifest, remote.indexes(manifest))
    codecs = Codecs()
    with pytest.raises(RemoteError):
        remote.read(
            manifest.packs[0].pack,
            frame.offset,
            frame.length,
            lambda record: open_frame(frame, record, codecs),
        )


def test_a_mirror_serves_what_the_first_url_has_damaged(
    store: Store, add: Add, folder: Path, tmp_path: Path
) -> None:
    add("a", BASE)
    push(store, "r", "a")
    subprocess.run(["cp", "-a", folder, tmp_path / "mirror"], check=True)
    for path in (*pack_files(folder), *(folder / "images").iterdir()):
        path.write_bytes(flipped(path.read_bytes(), -9 % (8 * path.stat().st_size)))
    mirrored = Remote(1, "r", [str(folder), str(tmp_path / "mirror")])
    assert image_bytes(mirrored, "a") == BASE


# --- many at a time, and processes that die ---


def start_push(store: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("dedupstore"), "--store", store, "push", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.fixture
def hosts(url: str, tmp_path: Path) -> list[Path]:
    """Four stores, each with an image `same` of its own and an image of its own name, of contents
    that they partly share."""
    paths = []
    for number in range(4):
        path = tmp_path / f"host{number}"
        with Store.create(path) as store:
            add_remote(store.env, "r", [url])
            data = content(number)
            import_bytes(store, tmp_path, "same", data)
            store.clone("same", f"own{number}")
        paths.append(path)
    return paths


def content(number: int) -> bytes:
    return noise(50, 3_000_000) + noise(60 + number, 1_000_000) + noise(51, 500_000)


def test_of_pushers_of_one_name_one_wins_and_the_others_are_told(
    hosts: list[Path], url: str
) -> None:
    pushes = [start_push(path, "r", "same") for path in hosts]
    ends = [(process.communicate()[1].decode(), process.returncode) for process in pushes]
    assert sorted(status for _, status in ends) == [0, 1, 1, 1], ends
    for message, status in ends:
        assert not status or ("same" in message and message.count("\n") == 1)
    remote = Remote(1, "r", [url])
    winner = [status for _, status in ends].index(0)
    assert image_bytes(remote, "same") == content(winner)


def test_pushers_of_different_names_all_win(hosts: list[Path], url: str) -> None:
    pushes = [start_push(path, "r", f"own{i}") for i, path in enumerate(hosts)]
    assert [(process.communicate()[1], process.returncode) for process in pushes] == [(b"", 0)] * 4
    remote = Remote(1, "r", [url])
    assert assert_whole(remote) == [f"own{i}" for i in range(4)]
    for number in range(4):
        assert image_bytes(remote, f"own{number}") == content(number)


def test_pushes_deletions_and_gc_beside_each_other_leave_every_image_whole(
    hosts: list[Path], url: str
) -> None:
    """The grace period is far longer than what a push takes from its last look to its end."""
    remote = Remote(1, "r", [url])
    over = threading.Event()
    failures: list[BaseException] = []
    deleted = 0

    def run(work: Callable[[], None]) -> None:
        try:
            while not over.is_set():
                work()
        except BaseException as error:
            failures.append(error)
            over.set()

    def collecting() -> None:
        nonlocal deleted
        deleted += collect(remote, 1).deleted
        time.sleep(0.1)

    def pushing(number: int) -> None:
        process = start_push(hosts[number], "r", f"own{number}")
        message = process.communicate()[1]
        assert process.returncode == 0, message
        remote.delete_root(f"own{number}")

    works = (collecting, partial(pushing, 0), partial(pushing, 1))
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    over.wait(3)
    over.set()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert deleted
    for number in range(4):
        with Store(hosts[number]) as store:
            push(store, "r", f"own{number}")
    for _ in range(2):
        time.sleep(1)
        collect(remote, 1)
    assert assert_whole(remote) == [f"own{i}" for i in range(4)]


@pytest.mark.parametrize("seed", range(2))
def test_a_push_killed_anywhere_leaves_no_torn_image_and_can_be_done_again(
    hosts: list[Path], url: str, seed: int
) -> None:
    chance = random.Random(seed)
    remote = Remote(1, "r", [url])
    for _ in range(3):
        process = start_push(hosts[0], "r", "own0")
        time.sleep(chance.uniform(0.1, 0.8))
        os.killpg(process.pid, 9)
        process.communicate()
        if assert_whole(remote):
            assert image_bytes(remote, "own0") == content(0)
            remote.delete_root("own0")
    with Store(hosts[0]) as store:
        push(store, "r", "own0")
        assert image_bytes(remote, "own0") == content(0)
        assert collect(remote, 3600).images == 1
