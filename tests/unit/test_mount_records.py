"""Records of mounts that somebody else could have written: they count as none, or are refused."""

from __future__ import annotations

import json
import socket
import struct
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from dedupstore.errors import MountError
from dedupstore.mounts import handshake
from dedupstore.mounts.mounts import Host
from dedupstore.mounts.state import Record, load_record, runtimes, save_record

DIGEST = "ab" * 32
SOUND = Record("/store", DIGEST, 4096, "erofs", DIGEST, "base", "/run/nbd.sock", homes=[DIGEST])
FIELDS = asdict(SOUND)

WRONG = {
    "list": "[]",
    "too-deep": "[" * 100_000,
    "socket-a-number": json.dumps(FIELDS | {"socket": 7}),
    "claims-a-text": json.dumps(FIELDS | {"claims": "base"}),
    "homes-numbers": json.dumps(FIELDS | {"homes": [1]}),
    "mounts-a-list": json.dumps(FIELDS | {"mounts": ["/mnt"]}),
    "mount-without-name": json.dumps(FIELDS | {"mounts": {"/mnt": None}}),
    "size-below-zero": json.dumps(FIELDS | {"size": -1}),
    "size-true": json.dumps(FIELDS | {"size": True}),
    "zero-byte": json.dumps(FIELDS | {"device": "/dev/nbd0\0"}),
    "unknown-field": json.dumps(FIELDS | {"what": 1}),
    "larger-than-any": json.dumps(FIELDS | {"name": "n" * (2 << 20)}),
}


@pytest.mark.parametrize("what", WRONG)
def test_record_of_a_wrong_form_counts_as_none(tmp_path: Path, what: str) -> None:
    directory = tmp_path / ("0" * 32) / f"{DIGEST[:32]}.0"
    directory.mkdir(parents=True)
    save_record(directory, SOUND)
    assert load_record(directory) == SOUND
    (directory / "record.json").write_text(WRONG[what])
    assert load_record(directory) is None
    assert Host(tmp_path).list_mounts() == ([], [])


def test_directory_that_others_can_write_is_not_looked_into(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(MountError, match="others can write here"):
        runtimes(tmp_path)
    with pytest.raises(MountError, match="others can write here"):
        Host(tmp_path).list_mounts()


def test_server_that_answers_without_end_is_no_server(tmp_path: Path) -> None:
    answer = struct.pack(">QIII", 0x3E889045565A9, 6, 3, 4) + bytes(4)
    greeting = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                connection.sendall(greeting)
                while True:
                    connection.sendall(answer * 100)
            except OSError:
                return

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(OSError, match="not an NBD server"):
            handshake.export_digest(tmp_path / "s", "/name", 20)
        thread.join(20)
        assert not thread.is_alive()
