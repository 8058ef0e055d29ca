"""A short run of tools/fault_loop, and that it sees what it is to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb
import pytest

from dedupstore.env import Environment
from dedupstore.errors import DedupError
from tests.programs import require_program
from tools.faults.injection import KINDS
from tools.faults.sweep import PromiseBrokenError, Sweep

SEED = 20261121
POINTS = 60


@pytest.fixture
def work(tmp_path: Path) -> Path:
    require_program("mkfs.erofs")
    return tmp_path


def test_calls_that_fail_anywhere_cost_no_more_than_the_command(work: Path) -> None:
    sweep = Sweep(SEED, work, print, keep=work)
    sweep.run(points=POINTS)
    figures = sweep.figures
    assert figures.faults_in_all + figures.missed == POINTS
    assert set(figures.faults) == {kind.name for kind in KINDS}
    assert figures.retried == figures.faults_in_all
    assert figures.failed > POINTS // 2


def test_command_that_hides_a_failed_commit_is_noticed(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands are forks of this process, so they have the fault that is put here."""

    write = Environment.write

    @contextmanager
    def write_carelessly(self: Environment) -> Iterator[lmdb.Transaction]:
        with suppress(DedupError), write(self) as txn:
            yield txn

    monkeypatch.setattr(Environment, "write", write_carelessly)
    sweep = Sweep(SEED, work, print, keep=work, only=("clone",))
    with pytest.raises(PromiseBrokenError, match="reported done, but names are"):
        sweep.run()
