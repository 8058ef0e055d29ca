"""What is to be fetched of an image without anybody reading it, and the trace to go by.

Owns the lazy records of database `meta` and the files in `traces`, named by image digest. A trace
is written and deleted under the write lock, in the transaction of the record that it belongs to.
Functions run inside the caller's transaction and are as thread-safe as that.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import lmdb

from dedupstore import catalog, format as fmt
from dedupstore.env import Environment
from dedupstore.errors import DedupError, StoreAccessError
from dedupstore.traces import Trace, read_trace, write_trace

TRACES_DIRECTORY = "traces"


def find_wish(txn: lmdb.Transaction, env: Environment, image: bytes) -> fmt.Wish | None:
    """The wish for an image; None if it has none, or a damaged one."""
    return catalog.read_derived(txn, env, fmt.wish_key(image), fmt.decode_wish)


def put_wish(
    txn: lmdb.Transaction, env: Environment, image: bytes, wish: fmt.Wish, trace: Trace | None
) -> None:
    """Record a wish, and the trace that it goes by, instead of what was recorded. Raises
    StoreAccessError, TargetError."""
    path = trace_path(env, image)
    try:
        if trace is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_trace(path, trace, 0o600)
    except OSError as error:
        raise StoreAccessError(f"{path}: {error.strerror}") from None
    key = fmt.wish_key(image)
    txn.put(key, fmt.encode_wish(wish, key), db=env.meta)


def add_wish(
    txn: lmdb.Transaction, env: Environment, image: bytes, wish: fmt.Wish, trace: Trace
) -> None:
    """As `put_wish`, for an image that has none."""
    if find_wish(txn, env, image) is None:
        put_wish(txn, env, image, wish, trace)


def set_paused(txn: lmdb.Transaction, env: Environment, image: bytes, *, paused: bool) -> bool:
    """Pause what an image's wish asks for, or go on with it; False: it asks for nothing."""
    wish = find_wish(txn, env, image)
    if wish is None or wish.prefetch == fmt.PREFETCH_NONE:
        return False
    key = fmt.wish_key(image)
    txn.put(key, fmt.encode_wish(fmt.Wish(wish.prefetch, paused), key), db=env.meta)
    return True


def forget_wishes(txn: lmdb.Transaction, env: Environment, images: set[bytes]) -> None:
    """Delete the wishes for images that are reclaimed."""
    for image in images:
        if txn.delete(fmt.wish_key(image), db=env.meta):
            with suppress(OSError):
                trace_path(env, image).unlink()


def trace_path(env: Environment, image: bytes) -> Path:
    """Where the trace of an image's wish is kept."""
    return env.path.parent / TRACES_DIRECTORY / image.hex()


def find_trace(env: Environment, image: bytes) -> Trace | None:
    """The trace that an image's wish goes by; None if there is none, or a damaged one."""
    try:
        return read_trace(trace_path(env, image))
    except DedupError:
        return None
