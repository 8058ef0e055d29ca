"""Clients that reconnect see nothing of a server that is killed or stopped and started again."""

from __future__ import annotations

from tests.interop.rig import require_nbdkit
from tests.programs import require_program
from tools import restarts

ROUNDS = 4


def test_clients_that_reconnect_read_every_byte_right_through_restarts() -> None:
    require_nbdkit()
    require_program("qemu-nbd")
    found = restarts.run(ROUNDS, seed=1)
    assert (found["killed"], found["stopped"]) == (2, 2)
    assert set(found["clients"]) == {"libnbd", "retry", "qemu"}
    for figures in found["clients"].values():
        assert figures["reads"] > restarts.READS_A_ROUND * ROUNDS
        assert (figures["errors"], figures["wrong"]) == (0, 0)
    assert found["clients"]["libnbd"]["reconnects"] >= ROUNDS
