"""What to mount for an image: the image itself, or the view that sharing takes, derived if need be.

The only part of the mounts that knows the store. Thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dedupstore import format as fmt
from dedupstore.errors import (
    ChunkDamagedError,
    NotShareableError,
    StoreAccessError,
    StoreFullError,
)
from dedupstore.mounts.sharing import KERNEL, NONE, POOL
from dedupstore.mounts.state import Export, Target
from dedupstore.store import ImageInfo, Store

Progress = Callable[[int, int], None]

_KINDS = {KERNEL: fmt.VIEW_KERNEL, POOL: fmt.VIEW_POOL}
_EROFS = "erofs"


def find_target(
    store: Store, name: str, modes: Sequence[str] = (NONE,), on_progress: Progress | None = None
) -> Target:
    """What to mount for image `name` in the first of `modes` (sharing's) that it can be shared in.

    Deriving a view takes seconds for a large image, once; `on_progress` as for an import. A store
    that has no room for it, a damaged chunk in the image, or contents that are still in a remote,
    all of which it would need, are no reason not to mount. Raises
    ImageNotFoundError, and for the last of `modes` NotShareableError and what else stops a view.
    """
    image = store.image(name)
    if len(modes) > 1 and store.missing_bytes(name):
        modes = modes[-1:]
    for position, mode in enumerate(modes):
        try:
            return _target(store, image, mode, on_progress or (lambda _done, _all: None))
        except (NotShareableError, StoreFullError, StoreAccessError, ChunkDamagedError) as error:
            if position < len(modes) - 1:
                continue
            if isinstance(error, NotShareableError):
                raise NotShareableError(f"image {name!r}, --share={mode}: {error}") from None
            raise
    raise AssertionError("no mode")


def _target(store: Store, image: ImageInfo, mode: str, on_progress: Progress) -> Target:
    export = Export(image.digest, image.size, image.kind)
    homes: tuple[Export, ...] = ()
    if mode != NONE:
        from dedupstore.views import ensure_view  # noqa: PLC0415 - 25 ms, where there is sharing

        view = ensure_view(store, bytes.fromhex(image.digest), _KINDS[mode], on_progress)
        export = Export(view.digest.hex(), view.size, _EROFS)
        homes = tuple(Export(home.hex(), size, _EROFS) for home, size in view.homes)
    path, uuid = store.path.resolve(), store.superblock.uuid.hex()
    may_fetch = store.env.remote is not None
    return Target(path, uuid, image.name, image.digest, export, mode, homes, may_fetch)
