"""What is mounted for an image when a view cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from dedupstore import views
from dedupstore.errors import (
    ChunkDamagedError,
    DedupError,
    NotShareableError,
    StoreAccessError,
    StoreFullError,
)
from dedupstore.mounts.state import Export
from dedupstore.mounts.targets import find_target
from dedupstore.store import Store
from tests.conftest import noise, silent

REASONS = [
    NotShareableError("of no kind"),
    StoreFullError("no space left"),
    StoreAccessError("not writable"),
    ChunkDamagedError(7, "fails its checksum"),
]


@pytest.fixture
def image(store: Store, tmp_path: Path) -> str:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(noise(1))
    store.import_path(tree, "image", silent)
    return "image"


def test_target_says_all_that_mounting_needs(store: Store, image: str) -> None:
    info = store.image(image)
    plain = find_target(store, image)
    assert (plain.store, plain.store_uuid) == (store.path, store.superblock.uuid.hex())
    assert (plain.name, plain.digest, plain.share) == (image, info.digest, "none")
    assert plain.export == Export(info.digest, info.size, "erofs")
    assert plain.export.name == f"/{info.digest}"
    pooled = find_target(store, image, ("pool", "none"))
    assert (pooled.digest, pooled.share) == (info.digest, "pool")
    assert pooled.export.digest != info.digest


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: type(reason).__name__)
def test_image_without_a_view_is_mounted_itself(
    store: Store, image: str, monkeypatch: pytest.MonkeyPatch, reason: DedupError
) -> None:
    def fail(*_: object) -> None:
        raise reason

    monkeypatch.setattr(views, "ensure_view", fail)
    assert find_target(store, image, ("pool", "none")) == find_target(store, image)
    with pytest.raises(type(reason)) as raised:
        find_target(store, image, ("pool",))
    if isinstance(reason, NotShareableError):
        assert str(raised.value) == "image 'image', --share=pool: of no kind"
