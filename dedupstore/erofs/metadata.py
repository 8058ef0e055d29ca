"""Bounded reads of metadata.

Owns the byte budget that keeps a hostile image from making the parser read the same bytes for
ever, and the window: one read that serves many inodes. Knows no inode formats. Not thread-safe:
a `Space` belongs to one walk.
"""

from collections.abc import Callable, Iterable

from dedupstore.errors import ErofsError

ReadAt = Callable[[int, int], bytes]  # (offset, length): up to length bytes, short at the end

# Directories and block maps are read once per inode, and in a sound image no two inodes share
# them, so their sum stays below the image's size; twice that leaves room for images that do share.
BUDGET_PER_IMAGE_BYTE = 2
BUDGET_BYTES_MIN = 1 << 16
# A terabyte image with a map entry per 4 KiB block needs this much; more would take Python minutes.
BUDGET_BYTES_MAX = 1 << 30

PIECE_BYTES = 1 << 20  # a map or directory is taken in pieces, to keep memory flat


class Budget:
    """How many more bytes of directories and block maps a walk may read."""

    __slots__ = ("left",)

    def __init__(self, image_bytes: int) -> None:
        wanted = max(image_bytes * BUDGET_PER_IMAGE_BYTE, BUDGET_BYTES_MIN)
        self.left = min(wanted, BUDGET_BYTES_MAX)

    def spend(self, offset: int, length: int) -> None:
        """Count `length` bytes; raises `ErofsError` at `offset` when they exceed the budget."""
        self.left -= length
        if self.left < 0:
            raise ErofsError(offset, "directories and block maps are larger than the image allows")


class Space:
    """A stretch of the image that holds inodes: nid n lies at byte `base` + 32 n, below `end`.

    The image itself is one; the contents of an uncompressed metabox inode are another. All
    offsets are bytes from the start of the image.
    """

    __slots__ = ("_budget", "_read_at", "_window", "_window_start", "base", "end")

    def __init__(self, read_at: ReadAt, base: int, end: int, budget: Budget) -> None:
        self._read_at = read_at
        self._budget = budget
        self._window = b""
        self._window_start = 0
        self.base = base
        self.end = end

    def load_window(self, start: int, needed: int, wanted: int) -> bytes:
        """Read ahead from `start`: at least `needed` bytes, and up to `wanted`.

        The bytes are returned and serve later calls of `bytes_at`. They are not charged to the
        budget: the caller bounds them by the inodes for which it reads them. Raises `ErofsError`
        when the needed ones are not inside the space.
        """
        data = self._read_at(start, min(wanted, self.end - start))
        if len(data) < needed:
            raise ErofsError(start + len(data), "the image ends where an inode should be")
        self._window = data
        self._window_start = start
        return data

    def charge(self, offset: int, length: int) -> None:
        """Count bytes that are copied although they were read before; see `Budget.spend`."""
        self._budget.spend(offset, length)

    def bytes_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes at `offset`, from the window if it has them.

        Charged to the budget. Raises `ErofsError` when they are not all inside the space.
        """
        self._budget.spend(offset, length)
        at = offset - self._window_start
        if at >= 0 and at + length <= len(self._window):
            return self._window[at : at + length]
        if offset + length > self.end:
            raise ErofsError(offset, f"{length} bytes of metadata reach behind the end")
        data = self._read_at(offset, length)
        if len(data) != length:
            raise ErofsError(offset, f"only {len(data)} of {length} bytes can be read")
        return data

    def pieces(self, offset: int, length: int) -> Iterable[bytes]:
        """Return `length` bytes at `offset` as buffers of `PIECE_BYTES`, the last maybe shorter.

        Raises `ErofsError` at once when they are not all inside the space.
        """
        if not length:
            return ()
        if length <= PIECE_BYTES:  # nearly always, and then a generator would double the time
            return (self.bytes_at(offset, length),)
        end = offset + length
        if end > self.end:  # said before gigabytes are worked on, not afterwards
            raise ErofsError(offset, f"{length} bytes of metadata reach behind the end")
        return (
            self.bytes_at(start, min(PIECE_BYTES, end - start))
            for start in range(offset, end, PIECE_BYTES)
        )
