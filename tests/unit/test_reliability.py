"""docs/reliability.md and the program that keeps its figures."""

from __future__ import annotations

import re

import pytest

from tools import reliability


def test_page_has_a_place_for_each_attack() -> None:
    page = reliability.PAGE.read_text()
    for attack in reliability.ATTACKS:
        changed = reliability.with_part(page, attack.name, "- new figures")
        assert changed.count("- new figures") == 1
        assert reliability.with_part(changed, attack.name, "x").count("- new figures") == 0
    assert set(re.findall(r"<!-- (\w+) -->", page)) == {a.name for a in reliability.ATTACKS}


def test_page_without_marks_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match="no marks for soak"):
        reliability.with_part("# Reliability\n", "soak", "figures")


@pytest.mark.parametrize("attack", reliability.ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_a_program_and_the_page_says_how_to_run_it(attack: reliability.Attack) -> None:
    program = reliability.ROOT / "tools" / attack.name
    assert program.stat().st_mode & 0o100
    assert f"`tools/{attack.name} " in reliability.PAGE.read_text()
