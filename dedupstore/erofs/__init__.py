"""Where file contents lie in an EROFS image: a read-only parser of its metadata.

Owns the on-disk structures of EROFS (erofs_fs.h of erofs-utils 1.9): `superblock` the geometry,
`layouts` where the bytes of one inode lie, `metadata` bounded reads, `walk` the way from the root
to every inode, `ranges` non-overlapping results. It opens nothing, decompresses nothing, decodes
no names, and knows nothing of chunks: the importer turns ranges into cuts.

Trust: an image comes from anywhere. Any bytes give either a result or `ErofsError`; work and
memory are bounded by the image's size (the bounds are constants of `walk` and `metadata`).

Thread-safety: no shared state; calls may run concurrently when their `read_at` may.
"""

from dedupstore.erofs.metadata import ReadAt
from dedupstore.erofs.superblock import Superblock, is_erofs, read_superblock
from dedupstore.erofs.walk import file_extents

__all__ = ["ReadAt", "Superblock", "file_extents", "is_erofs", "read_superblock"]
