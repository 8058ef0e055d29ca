"""External programs that tests drive."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pytest

NEW_EROFS = "DEDUPSTORE_NEW_EROFS"  # the directory of newer erofs-utils, set by tools/test
SYSTEM_DIRECTORIES = ("/usr/sbin", "/sbin")  # where mkfs programs live; not on a user's PATH
# Extended options, and the bit of the superblock's feature_incompat that they leave in an image.
EROFS_FEATURES = {"ztailpacking": 0x10, "fragments": 0x20, "all-fragments": 0x20, "dedupe": 0x20}


def program_path(name: str) -> str | None:
    """Find a program on PATH or in the system directories; None when it is missing."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(SYSTEM_DIRECTORIES))


def require_program(*names: str) -> None:
    """Skip the running test if a program is missing; fail it where the environment sets CI."""
    missing = [name for name in names if program_path(name) is None]
    if not missing:
        return
    unavailable(f"not installed: {', '.join(missing)}")


def require_root() -> None:
    """Skip the running test for an ordinary user; fail it where the environment sets CI."""
    if os.geteuid() == 0:
        return
    unavailable("needs root")


def unavailable(reason: str) -> NoReturn:
    """Skip the running test on a user's machine; fail it where the environment sets CI."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def erofs_programs(name: str) -> list[str]:
    """The machine's program of erofs-utils, and behind it the newer one that tools/test fetches,
    because the distribution's may lack compressors and layouts."""
    require_program(name)
    newer = os.environ.get(NEW_EROFS)
    found = [program_path(name), shutil.which(name, path=newer) if newer else None]
    return [program for program in found if program]


def erofs_options_honoured(options: Iterable[str], image: Path) -> bool:
    """Whether an image has the features that the options of its mkfs.erofs ask for: an old one
    passes over extended options that it does not know."""
    with image.open("rb") as file:
        file.seek(1024 + 80)
        (incompatible,) = struct.unpack("<I", file.read(4))
    words = {word for option in options for word in option.removeprefix("-E").split(",")}
    return all(incompatible & bit for word, bit in EROFS_FEATURES.items() if word in words)
