"""Where the programs are that do part of the work. Thread-safe."""

from __future__ import annotations

import shutil

from dedupstore.errors import ProgramError

# Distributions keep file system tools off an ordinary user's PATH.
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


def find_program(name: str, package: str) -> str:
    """Absolute path of a program, looked for where system tools live too. Raises ProgramError."""
    found = shutil.which(name) or shutil.which(name, path=_SYSTEM_PATH)
    if found is None:
        raise ProgramError(name, f"not found (install the package {package})")
    return found
