"""Values are read from the file where LMDB has them, whatever their size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dedupstore.env import Environment
from dedupstore.values import has_value, read_beginning, read_value, salvage_value

LENGTHS = (0, 1, 100, 2000, 2040, 4080, 4081, 100_000)
KEYS = {length: length.to_bytes(8, "big") for length in LENGTHS}


def content(length: int) -> bytes:
    return bytes(at * 7 % 251 for at in range(length))


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    opened = Environment(tmp_path, create=True)
    with opened.write() as txn:
        for length, key in KEYS.items():
            txn.put(key, content(length), db=opened.frames)
    return opened


@pytest.mark.parametrize("length", LENGTHS)
def test_value_is_what_was_written(env: Environment, length: int) -> None:
    key = KEYS[length]
    with env.read() as txn:
        assert read_value(txn, env, env.frames, key) == content(length)
        assert salvage_value(txn, env, env.frames, key) == content(length)
        assert read_beginning(txn, env, env.frames, key, 50) == (content(length)[:50], length)
        assert has_value(txn, env.frames, key)
    env.close()


def test_value_of_an_earlier_transaction_is_found_while_its_page_is_being_changed(
    env: Environment,
) -> None:
    with env.write() as txn:
        txn.put(b"12345678", b"new", db=env.frames)
        for length, key in KEYS.items():
            assert read_value(txn, env, env.frames, key) == content(length)
    env.close()


def test_missing_value_is_none(env: Environment) -> None:
    with env.read() as txn:
        assert read_value(txn, env, env.frames, b"missing!") is None
        assert salvage_value(txn, env, env.frames, b"missing!") is None
        assert read_beginning(txn, env, env.frames, b"missing!", 1) is None
        assert not has_value(txn, env.frames, b"missing!")
    env.close()


def test_what_the_disk_does_not_give_is_an_error_and_zeros_when_salvaged(
    env: Environment, tmp_path: Path
) -> None:
    """The file that is read ends early; the one that LMDB has mapped does not."""
    whole, data = content(100_000), env.path.read_bytes()
    begin = data.index(whole)
    cut = (begin // 4096 + 3) * 4096
    (tmp_path / "short").write_bytes(data[:cut])
    with (tmp_path / "short").open("rb") as short:
        os.dup2(short.fileno(), env.data_file, inheritable=False)
    with env.read() as txn:
        with pytest.raises(OSError, match="Input/output error"):
            read_value(txn, env, env.frames, KEYS[100_000])
        salvaged = salvage_value(txn, env, env.frames, KEYS[100_000])
        assert salvaged == whole[: cut - begin].ljust(100_000, b"\0")
    env.close()
