"""Root documents of remotes, against docs/remote-format.md."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from typing import Any

import pytest
import zstandard
from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.errors import RemoteDamagedError
from dedupstore.remote import roots
from dedupstore.remote.roots import Parts, Root
from dedupstore.traces import Trace, encode_trace

DIGEST = blake3(b"digest").digest()
PATH = "images/lib=2Fa"
PARTS = Parts(b"manifest\n", b"trace", b"index")
MANIFEST = blake3(PARTS.manifest).digest()
ROOT = Root("lib/a", DIGEST, 4096, fmt.KIND_EROFS, 12.5, MANIFEST, 9, PARTS)
ALONE = replace(ROOT, parts=None)
FIELDS = {
    "name": "lib/a",
    "digest": DIGEST.hex(),
    "size": 4096,
    "kind": "erofs",
    "created": 12.5,
    "manifest": MANIFEST.hex(),
    "manifest_bytes": 9,
}


def test_a_root_document_is_a_line_and_its_parts() -> None:
    line, rest = roots.encode_root(ROOT).split(b"\n", 1)
    assert json.loads(line) == FIELDS | {
        "format": 2,
        "trace_bytes": 5,
        "indexes_bytes": 5,
        "parts": blake3(rest).hexdigest(),
    }
    assert rest == b"manifest\ntraceindex"
    assert roots.decode_root(roots.encode_root(ROOT), PATH) == ROOT


def test_one_without_parts_is_of_version_1() -> None:
    assert json.loads(roots.encode_root(ALONE)) == FIELDS | {"format": 1}
    assert roots.decode_root(roots.encode_root(ALONE), PATH) == ALONE


def test_its_beginning_says_all_but_the_parts() -> None:
    for root in (ROOT, ALONE):
        assert roots.decode_beginning(roots.encode_root(root), PATH) == ALONE
    beginning = roots.encode_root(ROOT)[:-8]
    assert roots.decode_beginning(beginning, PATH) == ALONE


def test_the_line_of_the_longest_name_fits_into_a_beginning() -> None:
    name = "\x01" * 255  # six characters each in JSON
    root = replace(ROOT, name=name, size=(1 << 63) - 1, created=1e10 / 3)
    assert roots.encode_root(root).index(b"\n") < roots.LINE_BYTES_MAX


def test_an_empty_root_document_is_a_deleted_image() -> None:
    assert roots.decode_root(b"", "images/x") is None
    assert roots.decode_beginning(b"", "images/x") is None


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"name": ""},
        {"name": "\ud800"},
        {"name": 5},
        {"digest": "ab"},
        {"digest": DIGEST.hex().upper()},
        {"manifest": None},
        {"size": -1},
        {"size": 1 << 63},
        {"size": True},
        {"size": 4096.0},
        {"kind": "qcow2"},
        {"created": float("nan")},
        {"created": 1e300},
        {"manifest_bytes": 1 << 40},
        {"format": 3},
        {"format": "1"},
    ],
    ids=str,
)
@pytest.mark.parametrize("root", [ROOT, ALONE], ids=["parts", "alone"])
def test_a_root_document_that_cannot_be_is_refused_in_one_line(
    root: Root, change: dict[str, Any]
) -> None:
    line, rest = roots.encode_root(root).split(b"\n", 1)
    data = json.dumps(json.loads(line) | change).encode() + b"\n" + rest
    for decode in (roots.decode_root, roots.decode_beginning):
        with pytest.raises(RemoteDamagedError) as caught:
            decode(data, PATH)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"trace_bytes": 4},
        {"trace_bytes": 6, "indexes_bytes": 5},
        {"indexes_bytes": None},
        {"trace_bytes": 1 << 40},
        {"indexes_bytes": -1},
        {"manifest_bytes": 8},
        {"parts": DIGEST.hex()},
        {"parts": None},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    line, rest = roots.encode_root(ROOT).split(b"\n", 1)
    with pytest.raises(RemoteDamagedError):
        roots.decode_root(json.dumps(json.loads(line) | change).encode() + b"\n" + rest, PATH)


def test_every_flipped_bit_of_the_parts_is_seen() -> None:
    data = bytearray(roots.encode_root(ROOT))
    for at in range(data.index(b"\n") + 1, len(data)):
        data[at] ^= 1 << at % 8
        with pytest.raises(RemoteDamagedError):
            roots.decode_root(bytes(data), PATH)
        data[at] ^= 1 << at % 8


# --- parts ---


def test_a_trace_comes_back() -> None:
    trace = Trace(DIGEST, (DIGEST, MANIFEST), array("I", [5, 6]))
    assert roots.unpack_trace(roots.pack_trace(trace)) == trace


def test_a_trace_that_is_none_is_left_out() -> None:
    trace = encode_trace(Trace(DIGEST, (DIGEST,), array("I", [5])))
    compress = zstandard.compress
    newer = trace.replace(b"trace 1", b"trace 2")
    huge = compress(bytes(1 << 26))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(trace)
    for data in (b"", b"x", trace, compress(newer), compress(trace[:-2]), huge, unsized):
        assert roots.unpack_trace(data) is None
