"""The whole store against plain bytes and a dictionary of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from dedupstore.cache import FrameCache
from dedupstore.check import check_store
from dedupstore.constants import FRAME_BYTES_MAX, GRID_BYTES
from dedupstore.errors import ImageExistsError, ImageNotFoundError
from dedupstore.export import export_image
from dedupstore.manifest import Manifest
from dedupstore.reader import ImageReader, ReadCounters
from dedupstore.store import Store
from tests.conftest import (
    SilentPrefetcher,
    import_bytes,
    noise,
    opened,
    read_range,
    silent,
    text,
    write_sparse,
)

# What images are made of: a few stretches, some long, that all images share; and holes.
STRETCHES = (
    [noise(n, GRID_BYTES) for n in range(6)]
    + [noise(50 + n, 20 * GRID_BYTES) for n in range(3)]
    + [text(n, 40 * GRID_BYTES) for n in range(2)]
    + [bytes(GRID_BYTES), bytes(30 * GRID_BYTES)]
)
stretches = st.sampled_from(range(len(STRETCHES)))
tails = st.sampled_from([b"", b"", b"tail", bytes(100), noise(9, 3000)])
images = st.builds(
    lambda parts, tail: b"".join(STRETCHES[part] for part in parts) + tail,
    st.lists(stretches, max_size=12),
    tails,
)
budgets = st.sampled_from([1, FRAME_BYTES_MAX, 2 * FRAME_BYTES_MAX, 8 << 20])


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for all examples: they share chunks, as images do."""
    path = tmp_path_factory.mktemp("model") / "store"
    store = Store.create(path)
    yield store
    store.close()
    assert check_store(path).findings == ()


@given(
    data=images,
    budget=budgets,
    reads=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 200_000)), max_size=12),
    sparse=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_reads_equal_slices_of_the_image(
    shared_store: Store,
    tmp_path: Path,
    data: bytes,
    budget: int,
    reads: list[tuple[float, int]],
    sparse: bool,
) -> None:
    store = shared_store
    source = tmp_path / "source"
    if sparse:
        write_sparse(source, data)
    else:
        source.write_bytes(data)
    imported = store.import_path(source, "image", silent)[1]
    try:
        assert imported.size == len(data)
        with opened(store, "image", budget) as reader:
            extents = reader.manifest.extents(0, len(data))
            position = 0
            for start, length, hole in extents:
                assert start == position
                position += length
                assert not hole or not any(data[start : start + length])
            assert position == len(data)
            for place, wanted in reads:
                offset = int(place * max(len(data) - 1, 0))
                length = min(wanted, len(data) - offset)
                assert read_range(reader, offset, length) == data[offset : offset + length]
            if data:
                assert read_range(reader, 0, len(data)) == data
        export_image(store, "image", tmp_path / "out", silent)
        assert (tmp_path / "out").read_bytes() == data
    finally:
        store.remove(["image"])


names = st.sampled_from(["a", "b", "c", "d/e"])


class StoreMachine(RuleBasedStateMachine):
    """Everything users do with images, in any order, against a dictionary of bytes."""

    @initialize()
    def create(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="dedupstore-model-"))
        self.store = Store.create(self.directory / "store")
        self.images: dict[str, bytes] = {}
        self.open: list[tuple[ImageReader, Manifest, bytes]] = []
        self.cache = FrameCache(2 * FRAME_BYTES_MAX, self.store.loader().load)

    @rule(name=names, data=images)
    def import_image(self, name: str, data: bytes) -> None:
        if name in self.images:
            with pytest.raises(ImageExistsError):
                import_bytes(self.store, self.directory, name, data)
            return
        import_bytes(self.store, self.directory, name, data)
        self.images[name] = data

    @rule(source=names, copy=names)
    def clone(self, source: str, copy: str) -> None:
        if source not in self.images:
            with pytest.raises(ImageNotFoundError):
                self.store.clone(source, copy)
        elif copy in self.images:
            with pytest.raises(ImageExistsError):
                self.store.clone(source, copy)
        else:
            self.store.clone(source, copy)
            self.images[copy] = self.images[source]

    @rule(old=names, new=names)
    def rename(self, old: str, new: str) -> None:
        if old not in self.images:
            with pytest.raises(ImageNotFoundError):
                self.store.rename(old, new)
        elif new in self.images and new != old:
            with pytest.raises(ImageExistsError):
                self.store.rename(old, new)
        else:
            self.store.rename(old, new)
            self.images[new] = self.images.pop(old)

    @rule(gone=st.sets(names, min_size=1))
    def remove(self, gone: set[str]) -> None:
        if gone <= self.images.keys():
            self.store.remove(sorted(gone))
            for name in gone:
                del self.images[name]
        else:
            with pytest.raises(ImageNotFoundError):
                self.store.remove(sorted(gone))

    @rule(dry_run=st.booleans())
    def collect_garbage(self, dry_run: bool) -> None:
        chunks = self.store.stats().chunks
        collected = self.store.collect_garbage(dry_run=dry_run)
        expected = chunks if dry_run else chunks - collected.chunks
        assert self.store.stats().chunks == expected

    @precondition(lambda self: self.images)
    @rule(data=st.data())
    def open_image(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.images)))
        manifest = self.store.open_manifest(name)
        reader = ImageReader(name, manifest, self.cache, SilentPrefetcher(), ReadCounters())  # type: ignore[arg-type]
        self.open.append((reader, manifest, self.images[name]))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Images stay readable, and what they were, whatever became of their names."""
        reader, _, expected = self.open[data.draw(st.integers(0, len(self.open) - 1))]
        assert reader.manifest.size == len(expected)
        if expected:
            offset = data.draw(st.integers(0, len(expected) - 1))
            length = data.draw(st.integers(1, min(len(expected) - offset, 300_000)))
            assert read_range(reader, offset, length) == expected[offset : offset + length]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_image(self, data: st.DataObject) -> None:
        _, manifest, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.store.close_manifest(manifest)

    @rule()
    def reopen_the_store(self) -> None:
        for _, manifest, _ in self.open:
            self.store.close_manifest(manifest)
        self.open = []
        self.store.close()
        assert check_store(self.store.path).findings == ()
        self.store = Store(self.store.path)
        self.cache = FrameCache(2 * FRAME_BYTES_MAX, self.store.loader().load)

    @invariant()
    def names_and_sizes_are_the_models(self) -> None:
        listed = {image.name: image.size for image in self.store.images()}
        assert listed == {name: len(data) for name, data in self.images.items()}
        assert self.store.stats().logical_bytes == sum(map(len, self.images.values()))

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            for name, data in self.images.items():
                with opened(self.store, name) as reader:
                    assert read_range(reader, 0, len(data)) == data
            for _, manifest, _ in self.open:
                self.store.close_manifest(manifest)
            self.store.collect_garbage()
            if not self.images:
                assert self.store.stats().chunks == 0
            self.store.close()
            assert check_store(self.store.path).findings == ()
        finally:
            self.store.close()
            shutil.rmtree(self.directory)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
