"""Fixtures of the integration tests, taken over by the conftest.py of interop and fault."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.corpus import Images, build_images
from tests.interop.rig import Servers, StoreDirectory
from tests.interop.shop import Far, far_remote


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The images that the tests import."""
    return build_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def filled_store(tmp_path_factory: pytest.TempPathFactory, images: Images) -> Path:
    """A store to copy, never to use: base, its clone, derived and ragged."""
    store = StoreDirectory(tmp_path_factory.mktemp("filled") / "store")
    store.create()
    store.import_file(images.base, "base")
    store.import_file(images.derived, "derived")
    store.import_file(images.ragged, "ragged")
    store.clone("base", "clone")
    return store.path


@pytest.fixture
def store_dir(
    tmp_path: Path, filled_store: Path, request: pytest.FixtureRequest
) -> Iterator[StoreDirectory]:
    """A store with base, clone, derived and ragged, intact in the end unless marked damaged."""
    store = StoreDirectory(tmp_path / "store")
    shutil.copytree(filled_store, store.path)
    yield store
    if request.node.get_closest_marker("damaged") is None:
        store.check()


@pytest.fixture
def empty_store_dir(tmp_path: Path) -> Iterator[StoreDirectory]:
    """A store without images, which must be intact in the end."""
    store = StoreDirectory(tmp_path / "empty")
    store.create()
    yield store
    store.check()


@pytest.fixture
def server(store_dir: StoreDirectory) -> Iterator[Servers]:
    """Starts nbdkit on `store_dir`; in the end every server has logged nothing unannounced and
    ended with status 0."""
    servers = Servers(store_dir.path)
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, images: Images) -> Iterator[Far]:
    """A remote with image `base`."""
    with far_remote(tmp_path_factory.mktemp("shop"), images.base) as made:
        yield made


@pytest.fixture
def far(shop: Far) -> Iterator[Far]:
    """The same; what a test does to the link ends with it."""
    yield shop
    shop.link.up()
    shop.link.clear()
