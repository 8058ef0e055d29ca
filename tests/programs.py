"""External programs that tests drive."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

NEW_EROFS = "DEDUPSTORE_NEW_EROFS"  # the directory of newer erofs-utils, set by tools/test
SYSTEM_DIRECTORIES = ("/usr/sbin", "/sbin")  # where mkfs programs live; not on a user's PATH


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
