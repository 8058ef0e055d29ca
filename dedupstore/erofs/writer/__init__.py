"""File trees -> EROFS images: uncompressed, deterministic, laid out before contents are read.

Owns where trees come from (`directories`; `archives` with `archivecontents` and `acltext`) and how
an image is made: `inodes` lists and checks a tree, `chunks` cuts sparse files, `placement` says
where everything goes, `ondisk` and `xattrs` encode structures, `fingerprints` the digests for page
cache sharing, `encoding` the metadata, `plan` ties them together, `sequential` writes a whole
image. The tree model is `erofs.tree`.

The image depends on the tree alone: not on the order in which a directory lists its entries, on
inode numbers or on the time. Nothing is compressed or shared inside the image; that is the store's
work. Thread-safety: no shared state; contents may be read by several threads at once.
"""

from dedupstore.erofs.tree import (
    Attributes,
    Content,
    Directory,
    Extent,
    Node,
    ReadInto,
    RegularFile,
    Special,
    Symlink,
)
from dedupstore.erofs.writer.archives import scan_tar
from dedupstore.erofs.writer.directories import scan_directory
from dedupstore.erofs.writer.fingerprints import ContentDigest, Span
from dedupstore.erofs.writer.plan import ImagePlan, PlacedFile, plan_image
from dedupstore.erofs.writer.sequential import write_image

__all__ = [
    "Attributes",
    "Content",
    "ContentDigest",
    "Directory",
    "Extent",
    "ImagePlan",
    "Node",
    "PlacedFile",
    "ReadInto",
    "RegularFile",
    "Span",
    "Special",
    "Symlink",
    "plan_image",
    "scan_directory",
    "scan_tar",
    "write_image",
]
