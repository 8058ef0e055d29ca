"""External programs that tests drive."""

from __future__ import annotations

import os
import shutil

import pytest


def require_program(*names: str) -> None:
    """Skip the running test if a program is missing; fail it where the environment sets CI."""
    missing = [name for name in names if shutil.which(name) is None]
    if not missing:
        return
    reason = f"not installed: {', '.join(missing)}"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
