"""The remotes that a store knows: names, numbers, URLs."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from dedupstore import format as fmt
from dedupstore.check import check_store
from dedupstore.check.rebuild import _proven
from dedupstore.errors import RemoteError, RemoteNotFoundError, StoreDamagedError, UsageError
from dedupstore.remote.configuration import (
    add_remote,
    find_number,
    find_remote,
    find_to_change,
    list_remotes,
    remove_remote,
)
from dedupstore.remote.remote import Remote
from dedupstore.store import Store
from tests.conftest import flip_record
from tests.httpserver import object_server


def names(store: Store) -> list[str]:
    with store.env.read() as txn:
        return [name for name, _ in list_remotes(txn, store.env)]


def test_a_remote_is_made_once_and_then_only_made_known(store: Store, tmp_path: Path) -> None:
    made = add_remote(store.env, "one", [str(tmp_path / "r")])
    uuid = made.info().uuid
    with Store.create(tmp_path / "other") as other:
        again = add_remote(other.env, "mine", [f"file://{tmp_path}/r"])
        assert (again.info().uuid, again.number) == (uuid, made.number)
    found, known = find_remote(store.env, "one")
    assert (found.number, found.name, known) == (made.number, "one", uuid)
    assert found.number == int.from_bytes(uuid.bytes[:4], "little")
    assert find_number(store.env, made.number).name == "one"
    assert names(store) == ["one"]


def test_a_remote_that_is_removed_and_added_again_has_its_number(
    store: Store, tmp_path: Path
) -> None:
    number = add_remote(store.env, "one", [str(tmp_path / "r")]).number
    add_remote(store.env, "two", [str(tmp_path / "s")])
    remove_remote(store.env, "one", lambda _txn, _number: None)
    assert names(store) == ["two"]
    with pytest.raises(RemoteNotFoundError, match="remote add"):
        find_number(store.env, number)
    assert add_remote(store.env, "three", [str(tmp_path / "r")]).number == number


def test_a_remote_that_is_needed_is_not_removed(store: Store, tmp_path: Path) -> None:
    number = add_remote(store.env, "one", [str(tmp_path / "r")]).number
    asked = []

    def needed_by(_: object, number: int) -> str:
        asked.append(number)
        return "image 'a'"

    with pytest.raises(RemoteError, match="needed by image 'a'"):
        remove_remote(store.env, "one", needed_by)
    assert asked == [number]
    assert names(store) == ["one"]


def test_names_and_remotes_are_known_once(store: Store, tmp_path: Path) -> None:
    add_remote(store.env, "one", [str(tmp_path / "r")])
    with pytest.raises(RemoteError, match="there already"):
        add_remote(store.env, "one", [str(tmp_path / "s")])
    with pytest.raises(RemoteError, match="known as 'one'"):
        add_remote(store.env, "two", [str(tmp_path / "r")])
    for find in (find_remote, find_to_change):
        with pytest.raises(RemoteNotFoundError, match="remote ls"):
            find(store.env, "nothing")
    with pytest.raises(RemoteNotFoundError):
        remove_remote(store.env, "nothing", lambda _txn, _number: None)


@pytest.mark.parametrize("name", ["", "-x", ".x", "a/b", "é", "x" * 65, "a\n"])
def test_names_are_plain(store: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        add_remote(store.env, name, [str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


def test_mirrors_are_of_the_same_remote_or_still_empty(store: Store, tmp_path: Path) -> None:
    first, other, empty = (str(tmp_path / name) for name in ("first", "other", "empty"))
    add_remote(store.env, "other", [other])
    with pytest.raises(RemoteError, match="no mirror"):
        add_remote(store.env, "r", [first, other])
    add_remote(store.env, "r", [first, empty])
    with store.env.read() as txn:
        ((_, _), (_, record)) = list_remotes(txn, store.env)
    assert isinstance(record, fmt.RemoteRecord)
    assert record.urls == (first, empty)


def test_an_http_server_must_have_a_remote(store: Store) -> None:
    with object_server() as server:
        with pytest.raises(RemoteNotFoundError, match="is no remote"):
            add_remote(store.env, "r", [f"{server.url}/there"])
        uuid = UUID(int=1 << 100)
        server.objects["there/dedupstore.json"] = (
            b'{"format": 1, "uuid": "%s", "created": 5}' % str(uuid).encode()
        )
        assert add_remote(store.env, "r", [f"{server.url}/there"]).info().uuid == uuid
        assert not [line for line in server.asked if not line.startswith("GET")]


def test_a_place_that_holds_something_else_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "dedupstore.json").write_bytes(b"{}")
    with pytest.raises(RemoteError, match="format"):
        add_remote(store.env, "r", [str(tmp_path / "r")])
    assert names(store) == []


def test_a_remote_that_became_another_is_not_changed(store: Store, tmp_path: Path) -> None:
    add_remote(store.env, "r", [str(tmp_path / "r")])
    (tmp_path / "r").rename(tmp_path / "moved")
    with pytest.raises(RemoteNotFoundError, match="is no remote"):
        find_to_change(store.env, "r")
    Remote(0, "x", [str(tmp_path / "r")]).init()
    with pytest.raises(RemoteError, match="another one"):
        find_to_change(store.env, "r")


@pytest.mark.damaged
def test_a_damaged_record_is_found_mended_or_forgotten(store: Store, tmp_path: Path) -> None:
    number = add_remote(store.env, "r", [str(tmp_path / "r")]).number
    key = fmt.remote_key("r")
    flip_record(store, "meta", key, 100)
    with pytest.raises(StoreDamagedError):
        find_remote(store.env, "r")
    store.close()
    assert [one.what for one in check_store(store.path).findings] == ["remotes"]
    assert check_store(store.path, repair=True).intact
    with Store(store.path) as again:
        assert find_remote(again.env, "r")[0].number == number
        for bit in (100, 170):
            flip_record(again, "meta", key, bit)
    assert check_store(store.path, repair=True).intact
    with Store(store.path) as again:
        assert names(again) == []
        assert add_remote(again.env, "r", [str(tmp_path / "r")]).number == number


@pytest.mark.parametrize("name", ["remote-desktop", "superblock", "totals", "lostlostlost", "base"])
def test_a_rebuild_tells_an_image_named_as_a_record_is_from_the_record(name: str) -> None:
    """All it has is keys and values; the database is gone with the trees."""
    key = name.encode()
    image = fmt.encode_image(fmt.ImageRecord(bytes(range(32)), 5, 6, fmt.KIND_RAW), key)
    assert _proven(key, image) == ("images", key, image)
    key = fmt.remote_key("-desktop")
    record = fmt.encode_remote(fmt.RemoteRecord(7, bytes(16), ("s3://b/p",)), key)
    assert _proven(key, record) == ("meta", key, record)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: body[:-1],
        lambda body: body + b"\0",
        lambda body: body[:20] + b"\x02\0" + body[22:],
        lambda body: body[:20] + b"\0\0",
        lambda body: body[:10],
    ],
)
def test_a_record_of_a_ragged_length_is_damaged(spoil: object) -> None:
    key = fmt.remote_key("r")
    record = fmt.RemoteRecord(7, bytes(16), ("s3://b/p",))
    whole = fmt.encode_remote(record, key)
    assert fmt.decode_remote(whole, key) == record
    spoiled = fmt.guarded(spoil(whole[8:]), fmt.record_seed(key))  # type: ignore[operator]
    with pytest.raises(StoreDamagedError):
        fmt.decode_remote(spoiled, key)
    with pytest.raises(StoreDamagedError, match="checksum"):
        fmt.decode_remote(whole, fmt.remote_key("s"))
