"""Mounts outlive their server: killed or stopped and started again, what reads from them waits and
goes on. By the project's own mount logic, over real nbd devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dedupstore.store import Store
from tests.vm.rig import Reader, Service, at_once, leave_nothing
from tools.guests import inside
from tools.guests.guest import Guest
from tools.guests.sharing import Containers, best_share

FIRST, SECOND = "/mnt/1", "/mnt/2"


@pytest.fixture(scope="session")
def every_read(
    guests: dict[str, Guest],
    image_store: Store,
    image_servers: dict[str, Service],
    kinds: Path,
) -> dict[str, list[dict[str, object]]]:
    """What readers have read through three restarts, in all guests at the same time: a pause is
    five seconds."""
    containers = {
        suite: Containers(guest, image_store, image_servers[suite].store_reads)
        for suite, guest in guests.items()
    }

    def mount(suite: str, directory: str) -> None:
        containers[suite].mount("kinds", directory, best_share(guests[suite]))

    def start(suite: str) -> Reader:
        mount(suite, FIRST)
        return Reader(guests[suite], FIRST)

    readers = at_once(start, guests)
    steps: list[tuple[Callable[[Service], None], Callable[[str], None]]] = [
        (Service.kill, lambda suite: containers[suite].reconnect()),
        (Service.stop, lambda suite: containers[suite].reconnect()),
        (Service.kill, lambda suite: mount(suite, SECOND)),  # does it too
    ]
    for end, reconnect in steps:
        at_once(lambda suite: readers[suite].read_on(), guests)
        for server in image_servers.values():
            end(server)
            server.start()
        at_once(reconnect, guests)

    def finish(suite: str) -> list[dict[str, object]]:
        readers[suite].read_on()
        found = readers[suite].stop()
        leave_nothing(guests[suite], containers[suite])
        return found

    return at_once(finish, guests)


def test_reader_sees_no_error_and_no_wrong_byte_when_its_server_is_restarted(
    every_read: dict[str, list[dict[str, object]]], suite: str, kinds: Path
) -> None:
    assert every_read[suite] == inside.inventory(str(kinds))


def test_mount_whose_server_is_gone_is_unmounted_and_leaves_nothing(
    guest: Guest, containers: Containers, best: str, images: Service, kinds: Path
) -> None:
    containers.mount("kinds", FIRST, best)
    guest.do(["ls", FIRST])
    images.kill()
    try:
        leave_nothing(guest, containers)
    finally:
        images.start()


def test_reconnecting_what_is_connected_changes_nothing(
    guest: Guest, containers: Containers, best: str, kinds: Path
) -> None:
    containers.mount("kinds", FIRST, best)
    containers.reconnect()
    assert guest.python(inside.inventory, FIRST) == inside.inventory(str(kinds))
    assert "reconnected" not in guest.do("dmesg | tail -n 3")
