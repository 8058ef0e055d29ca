"""A short run of tools/power_loss, and that it sees what is not synced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import require_program, require_root
from tools.crashes import disk, outage
from tools.crashes.states import NOTHING_TO_LOSE

SEED = 20261121
COMMANDS, STATES = 14, 70


@pytest.fixture
def work(tmp_path: Path) -> Path:
    require_root()
    require_program("mkfs.ext4", "losetup", "mkfs.erofs", "nbdkit", "nbdfuse")
    return tmp_path


def test_power_lost_anywhere_loses_nothing_that_was_reported(work: Path) -> None:
    outages = outage.Outages(SEED, work, print, keep=work)
    outages.run(commands=COMMANDS, states=STATES, recordings=1)
    assert outages.figures.states_in_all == STATES
    assert outages.figures.states[NOTHING_TO_LOSE] < STATES // 2


def test_power_loss_is_seen_to_undo_commits_that_are_not_synced(work: Path) -> None:
    outages = outage.Outages(SEED, work, print, outage.without_syncs, keep=work)
    with pytest.raises(outage.PromiseBrokenError):
        outages.run(commands=COMMANDS, states=STATES, recordings=1)
    assert disk.mounts_below(work) == []
