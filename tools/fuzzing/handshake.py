"""What a server answers, as if it were none of ours (`mounts.handshake`).

An input is all that the server sends. Promises: OSError, or a digest, which is one word; as many
bytes are read as were sent.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping

from dedupstore.mounts.handshake import _INFO_DESCRIPTION, _OPT_INFO, _ask

BYTES_MAX = 4096


class _Stream(io.BytesIO):
    """A connection whose other side never waits."""

    def write(self, data: object) -> int:
        return len(data)  # type: ignore[arg-type]


def run(data: bytes) -> None:
    try:
        found = _ask(_Stream(data), _OPT_INFO, "/name") or {}  # type: ignore[arg-type]
        words = found.get(_INFO_DESCRIPTION, b"").decode(errors="replace").split()
    except OSError:
        return
    assert all(isinstance(word, str) for word in words)


def seeds() -> Mapping[str, bytes]:
    def reply(kind: int, payload: bytes) -> bytes:
        return struct.pack(">QIII", 0x3E889045565A9, 6, kind, len(payload)) + payload

    greeting = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3)
    described = reply(3, struct.pack(">H", 2) + b"dedupstore image base " + b"ab" * 32)
    return {
        "answer": greeting + described + reply(1, b""),
        "refusal": greeting + reply(1 << 31 | 6, b"no"),
        "without-end": greeting + described * 70,
        "large": greeting + struct.pack(">QIII", 0x3E889045565A9, 6, 3, 1 << 31),
        "greeting": greeting,
    }
