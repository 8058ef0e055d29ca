"""Fixtures that the tests of this folder share; see tests/interop/fixtures.py."""

from tests.interop.fixtures import (
    empty_store_dir,
    far,
    filled_store,
    images,
    server,
    shop,
    store_dir,
)

__all__ = ["empty_store_dir", "far", "filled_store", "images", "server", "shop", "store_dir"]
