"""Limits and fixed parameters, each with its unit and its reason. Owns numbers only.

A value marked *format* is part of what a store or a digest means and changes only with the format
version (docs/format.md); the others may be tuned freely.
"""

KIB = 1 << 10
MIB = 1 << 20
TIB = 1 << 40

# The grid every cut lies on: the block size of EROFS and the page size of the kernel's cache.
GRID_BYTES = 4 * KIB

# Longest chunk. 64 KiB and 256 KiB were measured beside it (docs/decisions/0002-frames.md): below,
# the index grows for 0.4 % of deduplication; above, changed files cost more.
CHUNK_BYTES_MAX = 128 * KIB

# Raw bytes that are compressed together. Larger frames compress better and waste less of LMDB's
# page rounding; a cold 4 KiB read pays for the whole frame (docs/decisions/0002-frames.md).
FRAME_BYTES_MAX = 256 * KIB

# And of metadata of file systems, of which a block is read here and a block there: starting Python
# from an image that is elsewhere brings 6.8 MB instead of 7.5 (5.9 with 64 KiB, in 0.15 s more).
METADATA_FRAME_BYTES_MAX = 128 * KIB

# Content-defined cuts of images that are not EROFS: shortest chunk, and the mask over a block's
# hash that ends one: on average a cut every 4 blocks beyond the shortest. Small, because chunks are
# compressed in frames and so cost only their index entry (docs/decisions/0001-cuts.md).
CDC_BYTES_MIN = 8 * KIB
CDC_MASK = 0x3

# Slots in a frame. A reference keeps 16 bits for the slot (format); the tighter bound keeps a
# frame's slot table on the first of its LMDB pages.
FRAME_SLOTS_MAX = 96

# zstd level: compression is most of an import (docs/decisions/0002-frames.md).
ZSTD_LEVEL = 1

# And of what is pushed: compressed once, by the host that has the time, and sent to many. 9 % fewer
# bytes than level 1 at 107 MB/s a core; level 9 gains another 1 % at 64 (docs/decisions/0008).
PUSH_ZSTD_LEVEL = 6

# Compression pays when it saves at least one part in this many.
COMPRESSION_GAIN_MIN = 16

# Address space reserved for the store's map. Sparse: it costs neither disk nor memory, and a store
# that never has to grow its map never disturbs the processes that have it open.
MAP_BYTES = 4 * TIB
# More map for what makes room, rm and gc above all: LMDB cannot delete without pages to write to.
MAP_RESERVE_BYTES = 64 << 30

# Concurrent read transactions over all processes. One is held per chunk being loaded, not per
# client.
LMDB_READERS_MAX = 1024

# Longest path of a unix socket, bytes: sockaddr_un has 108 with the closing zero.
SOCKET_PATH_BYTES_MAX = 107

# Longest image name in bytes of UTF-8. LMDB keys end at 511; NBD export names at 4096.
IMAGE_NAME_BYTES_MAX = 255

# Image bytes that one unit of import work reads and hashes, in images that are cut by content. No
# cut crosses its border, so it is part of what digests mean (*format*).
SEGMENT_BYTES = 4 * MIB

# The same where extents say where to cut: what a worker has read is still in its processor's cache
# when it is hashed and compressed.
EXTENT_SEGMENT_BYTES = MIB

# Compressed bytes per write transaction of an import: large enough that its fsync is noise, small
# enough that other writers wait for fractions of a second and little is left to do at the end.
BATCH_BYTES = 24 * MIB

# Raw bytes that one write transaction of gc decompresses and compresses again.
GC_REWRITE_BYTES = 16 * MIB

# Frames that one write transaction of gc deletes.
GC_DELETE_FRAMES = 4096

# Runs of free pages that compaction gives back in one hold of the write lock: other writers wait
# for tens of milliseconds.
COMPACT_RUNS = 1024

# Chunks of a trace: what is used beyond that is not noted. 64 GB of full chunks; a recording takes
# some 100 bytes of the server's memory for each.
TRACE_CHUNKS_MAX = 1 << 19
