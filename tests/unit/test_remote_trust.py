"""What somebody who can write to a remote can do to those who use it, and what he cannot:
docs/threat-model.md, "A malicious remote"."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dedupstore import format as fmt
from dedupstore.errors import DedupError
from dedupstore.frames import Codecs
from dedupstore.remote import fetching, layout, objects, packs
from dedupstore.remote.configuration import add_remote
from dedupstore.store import Store
from tests.conftest import import_bytes, noise, opened, read_image, read_range
from tests.lazy import IMAGES, make_remote, pull, push
from tests.remotes import split_root, write_root

DATA = noise(80, 1_000_000)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "TRIES_MAX", 2)
    monkeypatch.setattr(objects, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(fetching, "_FAILING_SECONDS", 0.0)


@pytest.fixture
def far(tmp_path: Path) -> Path:
    return make_remote(tmp_path)


@pytest.fixture
def host(store: Store, far: Path) -> Store:
    add_remote(store.env, "far", [str(far)])
    return store


def pass_off(far: Path, name: str, other: str) -> None:
    """Have a name in the remote stand for what another one does."""
    document, parts = split_root(far, other)
    write_root(far, name, {**document, "name": name}, parts)


def test_remote_is_believed_what_a_name_stands_for_and_the_digest_tells(
    host: Store, far: Path
) -> None:
    genuine = pull(host, "derived").digest
    pass_off(far, "base", "derived")
    assert pull(host, "base").digest == genuine
    assert host.image("base").digest == genuine.hex()
    assert read_image(host, "base") == IMAGES["derived"]


def test_image_that_was_pulled_stays_what_it_was_whatever_its_name_stands_for_later(
    host: Store, far: Path
) -> None:
    pull(host, "base")
    pass_off(far, "base", "derived")
    assert read_image(host, "base") == IMAGES["base"]


def test_pack_that_claims_chunks_it_has_not_is_served_to_nobody(
    host: Store, far: Path, tmp_path: Path
) -> None:
    import_bytes(host, tmp_path, "mine", DATA)
    # Somebody who knows what is going to be pushed is there first, with other bytes.
    with host.env.read() as txn:
        heads = [
            fmt.decode_frame_header(record, fmt.decode_frame_key(key))
            for key, record in txn.cursor(db=host.env.frames)
        ]
    forged = []
    for at, head in enumerate(heads[::2]):
        record = Codecs().encode(head.slots, noise(at, sum(slot.length for slot in head.slots)))
        fmt.seal_frame(record, packs.FRAME_SEED)
        forged.append(record)
    pack = packs.encode_pack(forged, bytes(16))
    file = far / layout.pack_path(pack.index.pack)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pack.data)
    push(host, "mine")
    with Store.create(tmp_path / "other") as other:
        add_remote(other.env, "far", [str(far)])
        pull(other, "mine")
        refused = []
        with opened(other, "mine") as reader:
            for at in range(0, len(DATA), 4096):
                wanted = DATA[at : at + 4096]
                try:
                    assert read_range(reader, at, len(wanted)) == wanted
                except DedupError as error:
                    refused.append(error.errno)
        assert set(refused) == {errno.EIO}
        assert len(refused) < len(DATA) // 4096
        other.fetcher().keeper.flush()
        assert other.missing_bytes("mine") > 0
    assert read_image(host, "mine") == DATA
