"""Records of mounts, as if another user could have written them (`mounts.state`).

An input is a record.json. Promises: it counts as none, or every field is of its type, it is saved
as it was loaded, and `mount --list` goes on.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

from dedupstore.mounts.mounts import Host
from dedupstore.mounts.state import Record, load_record, save_record

BYTES_MAX = 4096


@cache
def _attachment() -> Path:
    run_directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, run_directory, ignore_errors=True)
    directory = run_directory / ("0" * 32) / f"{'a' * 32}.0"
    directory.mkdir(parents=True)
    return directory


def run(data: bytes) -> None:
    directory = _attachment()
    (directory / "record.json").write_bytes(data)
    record = load_record(directory)
    mounts, attached = Host(directory.parents[1]).list_mounts()
    assert not mounts
    assert not attached
    if record is not None:
        assert record.export.name == f"/{record.digest}"
        save_record(directory, record)
        assert load_record(directory) == record


def seeds() -> Mapping[str, bytes]:
    digest = "ab" * 32
    record = Record("/store", digest, 4096, "erofs", digest, "base", "/run/s.sock")
    full = asdict(record) | {
        "device": "/dev/nbd0",
        "claims": ["base"],
        "mounts": {"/mnt": "base"},
        "homes": [digest],
    }
    wrong = {"mounts": ["/mnt"], "claims": "base", "size": -1, "socket": 7, "device": "a\0b"}
    found = {"plain": json.dumps(asdict(record)).encode(), "full": json.dumps(full).encode()}
    for field, value in wrong.items():
        found[f"wrong-{field}"] = json.dumps(full | {field: value}).encode()
    return found | {"deep": b"[" * 3000, "list": b"[]", "more": b'{"x":1}'}
