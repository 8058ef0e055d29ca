"""The images of a soak: made from numbers, alike enough to share chunks.

Not thread-safe; each loop has a maker of its own.
"""

from __future__ import annotations

import random
from pathlib import Path

_PART_BYTES = 64 << 10
_PARTS = 1 << 10  # contents that images have in common: 64 MiB


def _part(number: int) -> bytes:
    """Half words, half noise, as files are; the same for the same number."""
    source = random.Random(number)
    words = [source.randbytes(6).hex().encode() + b" " for _ in range(64)]
    half = _PART_BYTES // 2
    return b"".join(source.choices(words, k=half // 13 + 1))[:half] + source.randbytes(half)


def write_image(path: Path, seed: int, size: int, *, fresh: float) -> None:
    """Write a raw image of `size` bytes, a share `fresh` of its parts in no other image."""
    source = random.Random(seed)
    with path.open("wb") as file:
        for number in range(size // _PART_BYTES):
            if source.random() < fresh:
                file.write(source.randbytes(_PART_BYTES))
            else:
                file.write(_part((number * 7 + source.randrange(4)) % _PARTS))
