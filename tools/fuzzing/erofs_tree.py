"""The tree of any image, and the views derived from it: what a mount of an untrusted image runs
(`views`: read_tree, walk_files, pool, plan_image).

Promises: ErofsError, or a tree whose contents lie inside the image; SourceError or
NotShareableError, or a view that reads back as the same tree. Bytes and calls read within the
bounds that `erofs.inventory` states.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping

from dedupstore.erofs import read_tree
from dedupstore.erofs.tree import Directory, Node, RegularFile
from dedupstore.erofs.writer import write_image
from dedupstore.erofs.xattrs import PREFIXES_BYTES_MAX
from dedupstore.errors import ErofsError, NotShareableError, SourceError
from dedupstore.pooling import pool, require_poolable, walk_files
from tools.fuzzing import images
from tools.fuzzing.erofs_extents import Reader
from tools.fuzzing.messages import check_message

BYTES_MAX = 1 << 15
_IMAGE = bytes(32)
_WRITTEN_BYTES_MAX = 1 << 18  # views larger than that are laid out by no input of use


def run(data: bytes) -> None:
    reader = Reader(data)
    try:
        root = read_tree(reader.read_at, len(data))
    except ErofsError as error:
        check_message(error)
        return
    finally:
        reader.check_work(PREFIXES_BYTES_MAX)
    files = list(walk_files(root))
    for file in files:
        _read_edges(file)
    if sum(file.data_bytes + min(file.size, 1 << 20) for file in files) > _WRITTEN_BYTES_MAX:
        return
    try:
        out = io.BytesIO()
        write_image(root, out, fingerprints=True)
        written = out.getvalue()
        assert _shape(read_tree(Reader(written).read_at, len(written))) == _shape(root)
        require_poolable(root, _IMAGE)
        fingerprints = {id(file): os.urandom(32) for file in files if file.data_bytes}
        write_image(pool(root, _IMAGE, fingerprints, ()).root, io.BytesIO())
    except (SourceError, NotShareableError) as error:
        check_message(error)


def _read_edges(file: RegularFile) -> None:
    buffer = memoryview(bytearray(64))
    with file.content.opened() as read_into:
        for start, length in file.extents[:16]:
            assert 0 <= start < start + length <= file.size
            for at in (start, start + length - 1):
                assert 0 < read_into(at, buffer) <= min(64, file.size - at)
        if file.extents:
            assert read_into(file.size, buffer) == 0


def _shape(root: Directory) -> list[object]:
    """The tree's names and attributes, and sizes of files, in one order."""
    found: list[object] = []
    pending: list[tuple[bytes, Node]] = [(b"", root)]
    while pending:
        name, node = pending.pop()
        size = node.size if isinstance(node, RegularFile) else None
        attributes = node.attributes
        facts = (attributes.permissions, attributes.uid, attributes.gid, attributes.mtime)
        found.append((name, type(node), size, facts, sorted(attributes.xattrs.items())))
        if isinstance(node, Directory):
            pending.extend(sorted(node.entries.items(), key=lambda entry: entry[0]))
    return found


def seeds() -> Mapping[str, bytes]:
    plain = {"plain": images.written(fingerprints=False)}
    kept = ("indexes", "table", "folder", "devices", "xattrs", "metabox", "packed-prefixes", "far")
    drawn = {name: image for name, image in images.drawn().items() if name in kept}
    return {"written": images.written(fingerprints=True), **plain, **drawn}
