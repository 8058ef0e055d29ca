"""A tree -> the tree of its pool view: metadata here, contents as objects that mounts share.

A pool view is one EROFS image with two directories:

    tree/            the image's tree. A regular file with data has its size but no data, and the
                     overlay attributes `metacopy` and `redirect` to an object
    data/<id>/<n>    the objects of this view, in hexadecimal; <id> stands for its image

mounts/anchors.py stacks `tree` over the `data` of this view and of its *homes*: views that have
some of the contents already, which so are the same inodes for every mount. Where <id> could be seen
in the mounted tree (before Linux 6.5) a whiteout hides it.

Owns this layout and which objects are taken from where; hashes nothing, stores nothing. Pure and
thread-safe.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dedupstore.erofs.tree import (
    NO_CONTENT,
    Attributes,
    Directory,
    Node,
    RegularFile,
    Special,
)
from dedupstore.errors import NotShareableError
from dedupstore.format import split_digests

TREE, DATA = b"tree", b"data"
# Every home is a device and a mount of its own, so only a few, and only those that are worth it.
HOMES_MAX = 16
HOME_BYTES_MIN = 256 << 10

_ID_DIGITS = 16
_OVERLAY = b"trusted.overlay."
_METACOPY, _REDIRECT = _OVERLAY + b"metacopy", _OVERLAY + b"redirect"
_FOLDER = Attributes(0o755)
_OBJECT = Attributes(0o444)


@dataclass(frozen=True, slots=True)
class Home:
    """A view that others may take objects from: its digest, its image's, and its objects' SHA-256
    by number, packed."""

    view: bytes
    image: bytes
    objects: bytes


@dataclass(frozen=True, slots=True)
class Pooled:
    """A view's tree, the homes it needs, and the SHA-256 of its own objects by number, packed."""

    root: Directory
    homes: tuple[Home, ...]
    objects: bytes


Fingerprints = Mapping[int, bytes]
"""id() of a regular file -> SHA-256 of its content; files that are not in it keep their data."""


def object_id(image: bytes) -> bytes:
    """The name of the directory with the objects that the image with this digest brought."""
    return image.hex()[:_ID_DIGITS].encode()


def walk_files(root: Directory) -> Iterator[RegularFile]:
    """Every regular file once, in the order of the tree's names."""
    seen: set[int] = set()
    for _, node in _walk(root):
        if isinstance(node, RegularFile) and id(node) not in seen:
            seen.add(id(node))
            yield node


def require_poolable(root: Directory, image: bytes) -> None:
    """Raise NotShareableError for a tree that an overlay would show other than it is."""
    for name, node in _walk(root):
        shown = name.decode(errors="backslashreplace")
        if (
            isinstance(node, Special)
            and node.kind == stat.S_IFCHR
            and not (node.major | node.minor)
        ):
            raise NotShareableError(f"{shown!r} is a whiteout of overlayfs")
        if any(key.startswith(_OVERLAY) for key in node.attributes.xattrs):
            raise NotShareableError(f"{shown!r} has attributes of overlayfs")
    if object_id(image) in root.entries:
        raise NotShareableError(f"has an entry {object_id(image).decode()}")


def pool(
    root: Directory, image: bytes, fingerprints: Fingerprints, candidates: Sequence[Home]
) -> Pooled:
    """Build the view of a tree. `candidates`: views that may become homes, those preferred first.

    The order of the candidates is what makes mounts share: a content that several of them have is
    taken from the first, by every view.
    """
    homes = _choose(root, image, fingerprints, candidates)
    places: dict[bytes, bytes] = {}
    for home in reversed(homes):
        prefix = object_id(home.image)
        for number, content in enumerate(split_digests(home.objects)):
            places[content] = b"/%s/%x" % (prefix, number)
    own = object_id(image)
    objects: list[bytes] = []
    folder = Directory(_FOLDER)
    for file in walk_files(root):
        fingerprint = fingerprints.get(id(file))
        if fingerprint is not None and fingerprint not in places:
            name = b"%x" % len(objects)
            places[fingerprint] = b"/%s/%s" % (own, name)
            objects.append(fingerprint)
            folder.entries[name] = replace(file, attributes=_OBJECT)
    tree = _redirected(root, fingerprints, places)
    for image_of in (image, *(home.image for home in homes)):
        tree.entries[object_id(image_of)] = Special(Attributes(0), stat.S_IFCHR)
    data = Directory(_FOLDER, {own: folder} if folder.entries else {})
    view = Directory(_FOLDER, {TREE: tree, DATA: data})
    return Pooled(view, tuple(homes), b"".join(objects))


def _choose(
    root: Directory, image: bytes, fingerprints: Fingerprints, candidates: Sequence[Home]
) -> list[Home]:
    """The candidates from which most bytes come, in their order."""
    first: dict[bytes, int] = {}
    for index, home in enumerate(candidates):
        for fingerprint in split_digests(home.objects):
            first.setdefault(fingerprint, index)
    gained: Counter[int] = Counter()
    for file in walk_files(root):
        index_of = first.pop(fingerprints.get(id(file), b""), None)
        if index_of is not None:
            gained[index_of] += file.data_bytes
    taken = {object_id(image), *root.entries}
    chosen: list[int] = []
    for index, size in gained.most_common():
        name = object_id(candidates[index].image)
        if size >= HOME_BYTES_MIN and len(chosen) < HOMES_MAX and name not in taken:
            taken.add(name)
            chosen.append(index)
    return [candidates[index] for index in sorted(chosen)]


def _redirected(
    root: Directory, fingerprints: Fingerprints, places: Mapping[bytes, bytes]
) -> Directory:
    """A copy of a tree whose files redirect to their objects; hard links stay hard links."""
    top = Directory(root.attributes)
    copies: dict[int, Node] = {id(root): top}
    pending = [(root, top)]
    while pending:
        source, target = pending.pop()
        for name, node in source.entries.items():
            copy = copies.get(id(node))
            if copy is None:
                copy = copies[id(node)] = _copy(node, fingerprints, places)
                if isinstance(node, Directory) and isinstance(copy, Directory):
                    pending.append((node, copy))
            target.entries[name] = copy
    return top


def _copy(node: Node, fingerprints: Fingerprints, places: Mapping[bytes, bytes]) -> Node:
    if isinstance(node, Directory):
        return Directory(node.attributes)
    fingerprint = fingerprints.get(id(node))
    if not isinstance(node, RegularFile) or fingerprint is None:
        return node
    added = {_METACOPY: b"", _REDIRECT: places[fingerprint]}
    attributes = replace(node.attributes, xattrs={**node.attributes.xattrs, **added})
    return RegularFile(attributes, node.size, (), NO_CONTENT)


def _walk(root: Directory) -> Iterator[tuple[bytes, Node]]:
    """(name, node) of the root and of every entry, parents first, in the order of names."""
    pending: list[tuple[bytes, Node]] = [(b"/", root)]
    while pending:
        name, node = pending.pop()
        yield name, node
        if isinstance(node, Directory):
            pending.extend(sorted(node.entries.items(), reverse=True, key=_first))


def _first(entry: tuple[bytes, Node]) -> bytes:
    return entry[0]
