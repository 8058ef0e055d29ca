"""Records <-> bytes: the byte tables of docs/format.md, and nothing else.

Pure functions over bytes; no I/O, no LMDB, no policy. Every decoder verifies the record's guard
first and raises StoreDamagedError (ChunkDamagedError for frames) for anything that does not hold,
whatever the bytes are. Thread-safe. Used as `from dedupstore import format as fmt`.

All integers are little-endian, except in keys, where big-endian keeps LMDB's order numeric.
"""

from dedupstore.format.frames import (
    CODEC_DISTANT as CODEC_DISTANT,
)
from dedupstore.format.frames import (
    CODEC_RAW as CODEC_RAW,
)
from dedupstore.format.frames import (
    CODEC_ZSTD as CODEC_ZSTD,
)
from dedupstore.format.frames import (
    DROPPED as DROPPED,
)
from dedupstore.format.frames import (
    FRAME_KEY_BYTES as FRAME_KEY_BYTES,
)
from dedupstore.format.frames import (
    FRAME_RAW_BYTES_LIMIT as FRAME_RAW_BYTES_LIMIT,
)
from dedupstore.format.frames import (
    INDEX_BYTES as INDEX_BYTES,
)
from dedupstore.format.frames import (
    NOT_HERE as NOT_HERE,
)
from dedupstore.format.frames import (
    REF_HOLE as REF_HOLE,
)
from dedupstore.format.frames import (
    REF_SLOT_BITS as REF_SLOT_BITS,
)
from dedupstore.format.frames import (
    REF_SLOT_MASK as REF_SLOT_MASK,
)
from dedupstore.format.frames import (
    SLOT_ABSENT as SLOT_ABSENT,
)
from dedupstore.format.frames import (
    SLOT_DISTANT as SLOT_DISTANT,
)
from dedupstore.format.frames import (
    SLOT_DROPPED as SLOT_DROPPED,
)
from dedupstore.format.frames import (
    SLOT_PRESENT as SLOT_PRESENT,
)
from dedupstore.format.frames import (
    FrameHeader as FrameHeader,
)
from dedupstore.format.frames import (
    Slot as Slot,
)
from dedupstore.format.frames import (
    decode_frame_header as decode_frame_header,
)
from dedupstore.format.frames import (
    decode_frame_key as decode_frame_key,
)
from dedupstore.format.frames import (
    decode_frame_offsets as decode_frame_offsets,
)
from dedupstore.format.frames import (
    decode_frame_payload as decode_frame_payload,
)
from dedupstore.format.frames import (
    decode_index as decode_index,
)
from dedupstore.format.frames import (
    encode_distant_frame as encode_distant_frame,
)
from dedupstore.format.frames import (
    encode_frame as encode_frame,
)
from dedupstore.format.frames import (
    encode_index as encode_index,
)
from dedupstore.format.frames import (
    frame_key as frame_key,
)
from dedupstore.format.frames import (
    is_distant as is_distant,
)
from dedupstore.format.frames import (
    make_ref as make_ref,
)
from dedupstore.format.frames import (
    present as present,
)
from dedupstore.format.frames import (
    seal_frame as seal_frame,
)
from dedupstore.format.frames import (
    verify_frame as verify_frame,
)
from dedupstore.format.guards import (
    DIGEST_BYTES as DIGEST_BYTES,
)
from dedupstore.format.guards import (
    GUARD as GUARD,
)
from dedupstore.format.guards import (
    GUARD_BYTES as GUARD_BYTES,
)
from dedupstore.format.guards import (
    ZERO_DIGEST as ZERO_DIGEST,
)
from dedupstore.format.guards import (
    Buffer as Buffer,
)
from dedupstore.format.guards import (
    guarded as guarded,
)
from dedupstore.format.guards import (
    record_seed as record_seed,
)
from dedupstore.format.guards import (
    unguarded as unguarded,
)
from dedupstore.format.guards import (
    unpack as unpack,
)
from dedupstore.format.guards import (
    with_one_bit_mended as with_one_bit_mended,
)
from dedupstore.format.images import (
    IMAGE_BYTES as IMAGE_BYTES,
)
from dedupstore.format.images import (
    KIND_EROFS as KIND_EROFS,
)
from dedupstore.format.images import (
    KIND_NAMES as KIND_NAMES,
)
from dedupstore.format.images import (
    KIND_RAW as KIND_RAW,
)
from dedupstore.format.images import (
    ImageRecord as ImageRecord,
)
from dedupstore.format.images import (
    decode_draft as decode_draft,
)
from dedupstore.format.images import (
    decode_image as decode_image,
)
from dedupstore.format.images import (
    draft_key as draft_key,
)
from dedupstore.format.images import (
    draft_session as draft_session,
)
from dedupstore.format.images import (
    encode_draft as encode_draft,
)
from dedupstore.format.images import (
    encode_image as encode_image,
)
from dedupstore.format.images import (
    guess_image as guess_image,
)
from dedupstore.format.manifests import (
    IMAGE_DIGEST_CONTEXT as IMAGE_DIGEST_CONTEXT,
)
from dedupstore.format.manifests import (
    MANIFEST_RAW_BYTES_LIMIT as MANIFEST_RAW_BYTES_LIMIT,
)
from dedupstore.format.manifests import (
    MANIFEST_VERSION as MANIFEST_VERSION,
)
from dedupstore.format.manifests import (
    ImageDigest as ImageDigest,
)
from dedupstore.format.manifests import (
    ManifestRecord as ManifestRecord,
)
from dedupstore.format.manifests import (
    decode_manifest as decode_manifest,
)
from dedupstore.format.manifests import (
    decode_manifest_summary as decode_manifest_summary,
)
from dedupstore.format.manifests import (
    encode_manifest as encode_manifest,
)
from dedupstore.format.meta import (
    PREFETCH_ALL as PREFETCH_ALL,
)
from dedupstore.format.meta import (
    PREFETCH_NAMES as PREFETCH_NAMES,
)
from dedupstore.format.meta import (
    PREFETCH_NONE as PREFETCH_NONE,
)
from dedupstore.format.meta import (
    PREFETCH_TRACE as PREFETCH_TRACE,
)
from dedupstore.format.meta import (
    REMOTE_NAME_BYTES_MAX as REMOTE_NAME_BYTES_MAX,
)
from dedupstore.format.meta import (
    VIEW_KERNEL as VIEW_KERNEL,
)
from dedupstore.format.meta import (
    VIEW_POOL as VIEW_POOL,
)
from dedupstore.format.meta import (
    FileState as FileState,
)
from dedupstore.format.meta import (
    LostChunk as LostChunk,
)
from dedupstore.format.meta import (
    OriginRecord as OriginRecord,
)
from dedupstore.format.meta import (
    RemoteRecord as RemoteRecord,
)
from dedupstore.format.meta import (
    ViewRecord as ViewRecord,
)
from dedupstore.format.meta import (
    Wish as Wish,
)
from dedupstore.format.meta import (
    decode_lost as decode_lost,
)
from dedupstore.format.meta import (
    decode_lost_key as decode_lost_key,
)
from dedupstore.format.meta import (
    decode_origin as decode_origin,
)
from dedupstore.format.meta import (
    decode_remote as decode_remote,
)
from dedupstore.format.meta import (
    decode_remote_key as decode_remote_key,
)
from dedupstore.format.meta import (
    decode_view as decode_view,
)
from dedupstore.format.meta import (
    decode_view_key as decode_view_key,
)
from dedupstore.format.meta import (
    decode_wish as decode_wish,
)
from dedupstore.format.meta import (
    decode_wish_key as decode_wish_key,
)
from dedupstore.format.meta import (
    encode_lost as encode_lost,
)
from dedupstore.format.meta import (
    encode_origin as encode_origin,
)
from dedupstore.format.meta import (
    encode_remote as encode_remote,
)
from dedupstore.format.meta import (
    encode_view as encode_view,
)
from dedupstore.format.meta import (
    encode_wish as encode_wish,
)
from dedupstore.format.meta import (
    is_origin_key as is_origin_key,
)
from dedupstore.format.meta import (
    lost_key as lost_key,
)
from dedupstore.format.meta import (
    meta_kind as meta_kind,
)
from dedupstore.format.meta import (
    origin_key as origin_key,
)
from dedupstore.format.meta import (
    remote_key as remote_key,
)
from dedupstore.format.meta import (
    split_digests as split_digests,
)
from dedupstore.format.meta import (
    view_key as view_key,
)
from dedupstore.format.meta import (
    wish_key as wish_key,
)
from dedupstore.format.superblock import (
    FEATURE_COMPAT_LOST as FEATURE_COMPAT_LOST,
)
from dedupstore.format.superblock import (
    FEATURE_COMPAT_ORIGINS as FEATURE_COMPAT_ORIGINS,
)
from dedupstore.format.superblock import (
    FEATURE_COMPAT_REMOTES as FEATURE_COMPAT_REMOTES,
)
from dedupstore.format.superblock import (
    FEATURE_COMPAT_VIEWS as FEATURE_COMPAT_VIEWS,
)
from dedupstore.format.superblock import (
    FEATURE_INCOMPAT_REMOTE as FEATURE_INCOMPAT_REMOTE,
)
from dedupstore.format.superblock import (
    FEATURES_COMPAT_KNOWN as FEATURES_COMPAT_KNOWN,
)
from dedupstore.format.superblock import (
    FEATURES_INCOMPAT_KNOWN as FEATURES_INCOMPAT_KNOWN,
)
from dedupstore.format.superblock import (
    FEATURES_READONLY_COMPAT_KNOWN as FEATURES_READONLY_COMPAT_KNOWN,
)
from dedupstore.format.superblock import (
    FORMAT_VERSION as FORMAT_VERSION,
)
from dedupstore.format.superblock import (
    SUPER_MAGIC as SUPER_MAGIC,
)
from dedupstore.format.superblock import (
    SUPERBLOCK_KEY as SUPERBLOCK_KEY,
)
from dedupstore.format.superblock import (
    Superblock as Superblock,
)
from dedupstore.format.superblock import (
    Totals as Totals,
)
from dedupstore.format.superblock import (
    check_superblock as check_superblock,
)
from dedupstore.format.superblock import (
    decode_superblock as decode_superblock,
)
from dedupstore.format.superblock import (
    decode_totals as decode_totals,
)
from dedupstore.format.superblock import (
    encode_superblock as encode_superblock,
)
from dedupstore.format.superblock import (
    encode_totals as encode_totals,
)
from dedupstore.format.superblock import (
    guess_superblock as guess_superblock,
)
from dedupstore.format.superblock import (
    with_incompatible as with_incompatible,
)
