"""What must not grow: counted, never timed. Times are for tools/bench (suites scaling-*)."""

from __future__ import annotations

import gc
import sys
import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedupstore import catalog, format as fmt, gc as gc_module
from dedupstore.check import check_store
from dedupstore.errors import ImageNotFoundError
from dedupstore.imported import Imported
from dedupstore.store import Store
from nbdplugin.session import Config, Session
from tests.conftest import import_bytes, noise, opened, read_image, read_range
from tools.benchmarks import synthetic

Add = Callable[[str, bytes], Imported]

SPARSE_BYTES = (16 << 40) - 4096  # the largest file that ext4 has


@contextmanager
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Notes every record of a name, and every manifest, that is decoded."""
    seen: list[str] = []

    def noting(decode: Callable[..., object], what: str) -> Callable[..., object]:
        def note(*arguments: object) -> object:
            seen.append(what)
            return decode(*arguments)

        return note

    with monkeypatch.context() as patch:
        for what in ("image", "manifest", "manifest_summary"):
            name = f"decode_{what}"
            patch.setattr(fmt, name, noting(getattr(fmt, name), what))
        yield seen


# --- images ---


@pytest.mark.parametrize(
    ("work", "records"),
    [
        pytest.param(lambda store: store.clone("a", "new"), ["image"], id="clone"),
        pytest.param(lambda store: store.image("a"), ["image", "manifest_summary"], id="info"),
        pytest.param(lambda store: store.remove(["clone-000003"]), [], id="rm"),
        pytest.param(
            lambda store: store.close_manifest(store.open_manifest("a")),
            ["image", "image", "manifest"],
            id="open",
        ),
        pytest.param(
            lambda store: store.digests_of(["a", "no such image"]), ["image"], id="digests"
        ),
    ],
)
def test_work_on_an_image_decodes_its_own_records_alone(
    store: Store,
    add: Add,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Store], object],
    records: list[str],
) -> None:
    add("a", noise(1, 1 << 20))
    synthetic.add_clones(store, "a", 100)
    with decoded(monkeypatch) as seen:
        work(store)
    assert seen == records


def test_clones_share_one_manifest_while_any_is_open(
    store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("a", noise(1, 1 << 20))
    synthetic.add_clones(store, "a", 100)
    with decoded(monkeypatch) as seen:
        manifests = [store.open_manifest(name) for name in store.names()]
    assert len({id(manifest) for manifest in manifests}) == 1
    assert seen.count("manifest") == 1
    for manifest in manifests:
        store.close_manifest(manifest)


def test_manifest_takes_16_bytes_a_chunk_at_most(store: Store) -> None:
    synthetic.add_chunks(store, "a", 5_000, seed=1)  # each a run of its own, the worst case
    manifest = store.open_manifest("a")
    assert len(manifest.refs) == store.image("a").chunks == 5_000
    heads = 2 * sys.getsizeof(array("Q")) + 8  # and the end of the last run
    assert sys.getsizeof(manifest.starts) + sys.getsizeof(manifest.refs) - heads == 16 * 5_000
    store.close_manifest(manifest)


def test_sparse_image_of_16_tib_costs_what_its_data_cost(store: Store, tmp_path: Path) -> None:
    data = noise(1, 64 << 10)
    source = tmp_path / "sparse.img"
    with source.open("wb") as file:
        for at in (0, 8 << 40, SPARSE_BYTES - len(data)):
            file.seek(at)
            file.write(data)
    read: list[int] = []
    imported = store.import_path(source, "sparse", lambda done, _: read.append(done))[1]
    assert (imported.size, imported.new_bytes) == (SPARSE_BYTES, len(data))
    assert sum(read) == 3 * len(data)
    manifest = store.open_manifest("sparse")
    assert len(manifest.refs) < 50
    extents = list(manifest.extents(0, SPARSE_BYTES))
    assert [hole for _, _, hole in extents] == [False, True, False, True, False]
    store.close_manifest(manifest)


# --- a server's exports ---


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """`session(*images)`: the plugin's logic, on a store with a, a-000000 to a-000099, and z."""
    path = tmp_path / "served"
    with Store.create(path) as store:
        import_bytes(store, tmp_path, "a", noise(1, 1 << 20))
        synthetic.add_clones(store, "a", 100, "a-")
        import_bytes(store, tmp_path, "z", noise(2))
    started: list[Session] = []

    def start(*images: str) -> Session:
        started.append(Session(Config(path, list(images), cache_bytes=1 << 20)))
        return started[-1]

    yield start
    for each in started:
        each.close()
    assert check_store(path).findings == ()


@pytest.mark.parametrize(
    ("images", "name", "looked_at"),
    [
        pytest.param((), "a", 1, id="all"),
        pytest.param(("z",), "z", 1, id="name"),
        pytest.param(("a-*",), "a-000000", 1, id="glob"),
        pytest.param(("a-00000[2-5]",), "a-000002", 3, id="set"),
        pytest.param(("*z",), "z", 102, id="leading star"),
    ],
)
def test_default_export_looks_at_names_that_begin_like_its_pattern(
    session: Callable[..., Session],
    monkeypatch: pytest.MonkeyPatch,
    images: tuple[str, ...],
    name: str,
    looked_at: int,
) -> None:
    names: list[bytes | memoryview] = []
    decode = catalog.decode_name

    def noting(key: bytes | memoryview) -> str:
        names.append(key)
        return decode(key)

    monkeypatch.setattr(catalog, "decode_name", noting)
    assert session(*images).default_export() == name
    assert len(names) == looked_at


@pytest.mark.parametrize("pattern", ["b", "b*", "a-1?", "\udc80*", "n" * 600 + "*"])
def test_pattern_without_an_image_serves_none(
    session: Callable[..., Session], pattern: str
) -> None:
    served = session(pattern)
    assert list(served.exports()) == []
    with pytest.raises(ImageNotFoundError):
        served.default_export()


def test_exports_are_those_of_each_pattern_in_turn_once(session: Callable[..., Session]) -> None:
    served = session("z", "a-00000[01]", "a-*1", "nothing")
    ending = [f"a-0000{i}1" for i in range(1, 10)]
    assert list(served.exports()) == ["z", "a-000000", "a-000001", *ending]


def test_export_by_digest_is_served_for_a_served_name_alone(
    session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = session("a")
    own, other = (f"/{served.store.image(name).digest}" for name in ("a", "z"))
    with decoded(monkeypatch) as seen:
        served.close_export(served.open(own))
        with pytest.raises(ImageNotFoundError):
            served.open(other)
    assert seen == ["image", "manifest", "image"]


def test_closed_export_gives_its_manifest_back_at_once(session: Callable[..., Session]) -> None:
    served = session()
    reader = served.open("a")
    manifest = weakref.ref(reader.manifest)
    gc.disable()
    try:
        served.close_export(reader)
        del reader
        assert manifest() is None
    finally:
        gc.enable()


# --- gc ---


def test_sweep_looks_at_the_names_once_while_nobody_else_writes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.add_chunks(store, "dead", 200, seed=1)
    synthetic.add_small_images(store, 0, 5)
    store.remove(["dead"])
    monkeypatch.setattr(gc_module, "GC_DELETE_FRAMES", 1)
    with decoded(monkeypatch) as seen:
        collected = store.collect_garbage()
    assert collected.frames_removed > 20
    assert seen.count("image") == 5 * 2  # to mark, and in the first transaction


def test_sweep_looks_again_after_somebody_else_has_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that comes between two transactions of one sweep, and relies on what is dead."""
    synthetic.add_chunks(store, "dead", 200, seed=1)
    with opened(store, "dead") as reader:
        data = read_range(reader, 0, synthetic.CHUNK_BYTES)
        frame = reader.manifest.refs[0] >> fmt.REF_SLOT_BITS
    store.remove(["dead"])
    monkeypatch.setattr(gc_module, "GC_DELETE_FRAMES", 1)
    steps: list[int] = []

    def meanwhile(done: int, _total: int) -> None:
        steps.append(done)
        if done == 3:
            assert import_bytes(store, tmp_path, "late", data).new_bytes == 0

    collected = store.collect_garbage(on_progress=meanwhile)
    assert len(steps) == frame
    assert collected.chunks == 199
    assert read_image(store, "late") == data
