"""External programs that tests drive."""

from __future__ import annotations

import os
import shutil

import pytest

SYSTEM_DIRECTORIES = ("/usr/sbin", "/sbin")  # where mkfs programs live; not on a user's PATH


def program_path(name: str) -> str | None:
    """Find a program on PATH or in the system directories; None when it is missing."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(SYSTEM_DIRECTORIES))


def require_program(*names: str) -> None:
    """Skip the running test if a program is missing; fail it where the environment sets CI."""
    missing = [name for name in names if program_path(name) is None]
    if not missing:
        return
    reason = f"not installed: {', '.join(missing)}"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def require_root() -> None:
    """Skip the running test for an ordinary user; fail it where the environment sets CI."""
    if os.geteuid() == 0:
        return
    reason = "needs root"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
