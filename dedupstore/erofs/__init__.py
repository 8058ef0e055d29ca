"""What is in an EROFS image: a read-only parser of its metadata.

Owns the on-disk structures of EROFS (erofs_fs.h of erofs-utils 1.9): `superblock` the geometry,
`inodes` their forms, `layouts` where the bytes of one inode lie, `metadata` bounded reads, `walk`
the way from the root to every inode's bytes, `ranges` non-overlapping results. `inventory` reads
a whole tree with names and attributes, into the model of `tree`; of that, `listing` owns
directories, `xattrs` extended attributes and `contents` the stretches of files. It opens nothing,
decompresses nothing, and knows nothing of the store's chunks: the importer turns ranges into cuts.

Trust: an image comes from anywhere. Any bytes give either a result or `ErofsError`; work and
memory are bounded by the image's size (the bounds are constants of `walk`, `inventory`, `inodes`,
`contents` and `metadata`).

Thread-safety: no shared state; calls may run concurrently when their `read_at` may.
"""

from dedupstore.erofs.inventory import read_tree
from dedupstore.erofs.metadata import ReadAt
from dedupstore.erofs.superblock import Superblock, is_erofs, read_superblock
from dedupstore.erofs.walk import file_extents

__all__ = ["ReadAt", "Superblock", "file_extents", "is_erofs", "read_superblock", "read_tree"]
