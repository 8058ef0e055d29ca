"""Looking for an archive in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dedupstore.archives import find_opener
from dedupstore.errors import SourceError


def test_file_that_cannot_be_read_is_no_file_without_an_archive() -> None:
    with pytest.raises(SourceError, match="Input/output error"):
        find_opener(Path("/proc/self/mem"))  # nothing is mapped at address 0
