"""Names and documents of remotes, against docs/remote-format.md."""

from __future__ import annotations

import json
from uuid import UUID

import pytest
from blake3 import blake3

from dedupstore.errors import RemoteDamagedError
from dedupstore.remote import layout

DIGEST = blake3(b"digest").digest()

# --- names ---


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("debian-12.5_x", "images/debian-12.5_x"),
        ("lib/a:b", "images/lib=2Fa=3Ab"),
        ("a=2Fb", "images/a=3D2Fb"),
        ("é", "images/=C3=A9"),
        ("..", "images/=2E=2E"),
        ("x" * 200, "images/" + "x" * 200),
        ("x" * 201, "images/=" + blake3(b"x" * 201).hexdigest()),
        ("é" * 100, "images/=" + blake3("é".encode() * 100).hexdigest()),
    ],
)
def test_names_become_paths(name: str, path: str) -> None:
    assert layout.image_path(name) == path


def test_paths_of_packs_bundles_and_manifests() -> None:
    name = "ab" + "0" * 62
    pack, bundle, manifest = f"packs/ab/{name}", f"indexes/{name}", f"manifests/{name}"
    assert layout.pack_path(bytes.fromhex(name)) == pack
    assert layout.bundle_path(bytes.fromhex(name)) == bundle
    assert layout.manifest_path(bytes.fromhex(name)) == manifest
    for path in (pack, bundle, manifest):
        assert layout.id_of(path) == bytes.fromhex(name)
        assert layout.is_pack(path) == (path == pack)
        assert layout.id_of(f"{path}0") is None
    for other in (f"packs/ac/{name}", f"packs/{name}", f"indexes/ab/{name}", f"images/{name}"):
        assert layout.id_of(other) is None


# --- documents ---


def test_documents_are_what_the_format_says() -> None:
    info = layout.RemoteInfo(UUID(int=7), 5.0)
    assert json.loads(layout.encode_info(info)) == {
        "format": 1,
        "uuid": str(UUID(int=7)),
        "created": 5.0,
    }
    assert layout.decode_info(layout.encode_info(info)) == info


def test_condemned_documents_name_packs_bundles_and_manifests_only() -> None:
    kinds = (layout.pack_path, layout.bundle_path, layout.manifest_path)
    paths = frozenset(path_of(DIGEST) for path_of in kinds)
    assert layout.decode_condemned(layout.encode_condemned(paths), "c") == paths
    for path in ("images/a", "../x", "packs/../images/a", "indexes/a", 5, None):
        with pytest.raises(RemoteDamagedError, match="condemns what is no pack"):
            layout.decode_condemned(json.dumps({"format": 1, "objects": [path]}).encode(), "c")


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000, b"{}"])
def test_what_is_no_document_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteDamagedError):
        layout.decode_info(data)
