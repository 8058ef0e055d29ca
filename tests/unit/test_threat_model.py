"""docs/threat-model.md says which test holds each claim: those tests are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "threat-model.md").read_text()


def test_tests_that_the_threat_model_names_are_there() -> None:
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(names) >= 10
    assert not [name for name in names if f"def {name}(" not in written]


def test_files_that_the_threat_model_names_are_there() -> None:
    files = set(re.findall(r"`(\w+/test_[\w*]+\.py)`", PAGE))
    assert len(files) >= 8
    assert not [file for file in files if not list((ROOT / "tests").glob(file))]
