"""Kernels that this machine lacks read what it serves: the guests, nbd devices, EROFS mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.rig import wait_until
from tests.vm.rig import PERSISTENT, Service, attach
from tools.guests.guest import Guest, GuestError
from tools.guests.inside import cached_bytes, inventory, map_all, nbd_bytes_read, read_all

RELEASES = {"bookworm": "6.1.", "trixie-backports": "7."}
MIB = 1 << 20


# --- the guest ---


def test_guest_runs_the_suites_kernel(guest: Guest, suite: str) -> None:
    assert guest.release.startswith(RELEASES[suite])
    assert guest.do(["uname", "-r"]).strip() == guest.release


def test_command_gives_status_output_and_errors_as_they_are(guest: Guest) -> None:
    result = guest.run(r"printf 'a\377b'; echo no >&2; exit 3")
    assert (result.returncode, result.stdout, result.stderr) == (3, "a\udcffb", "no\n")
    assert guest.run(["/no/such/program"]).returncode == 127


def test_background_process_holds_nothing_up(guest: Guest) -> None:
    assert guest.run("sleep 1000 & echo $!", timeout=10).returncode == 0
    guest.do(["killall", "sleep"])


def test_hanging_command_is_ended_and_the_guest_goes_on(guest: Guest) -> None:
    with pytest.raises(GuestError, match="no end after"):
        guest.run(["sleep", "1000"], timeout=0.2)
    with pytest.raises(GuestError, match="no end after"):
        guest.python(sleep_seconds, 1000, timeout=0.2)
    assert guest.run("pidof sleep").returncode == 1


def sleep_seconds(seconds: float) -> None:
    import time  # noqa: PLC0415 - only the source of this function goes to the guest

    time.sleep(seconds)


def test_python_function_runs_in_the_guest(guest: Guest) -> None:
    assert guest.python(sorted_text, ["b", "a\udcff"]) == "a\udcff b"
    assert guest.python("def main(x):\n    return x + 1\n", 41) == 42
    with pytest.raises(GuestError, match="KeyError: 'nothing'"):
        guest.python("def main():\n    return {}['nothing']\n")


def sorted_text(words: list[str]) -> str:
    return " ".join(sorted(words))


def test_file_written_is_there(guest: Guest) -> None:
    data = bytes(range(256)) * 5000
    guest.write("/tmp/new/file", data)
    assert guest.do(["wc", "-c", "/tmp/new/file"]).split()[0] == str(len(data))
    guest.do(["rm", "-r", "/tmp/new"])


# --- nbd devices and mounts ---


def test_plain_mount_has_the_inventory_of_the_tree(guest: Guest, mounted: str, tree: Path) -> None:
    expected = inventory(str(tree))
    found = guest.python(inventory, mounted)
    assert [entry["path"] for entry in found] == [entry["path"] for entry in expected]
    assert found == expected


def test_reading_twice_costs_page_cache_and_transfers_once(
    guest: Guest, mounted: str, tree: Path
) -> None:
    distinct = distinct_bytes(tree)
    cached, transferred = guest.python(cached_bytes), guest.python(nbd_bytes_read, "nbd0")
    total = guest.python(read_all, mounted)
    once = guest.python(cached_bytes) - cached
    assert distinct < once < distinct + MIB
    assert guest.python(nbd_bytes_read, "nbd0") - transferred < distinct + MIB
    assert guest.python(read_all, mounted) == guest.python(map_all, mounted) == total
    assert guest.python(cached_bytes) - cached < once + MIB // 4
    assert guest.python(nbd_bytes_read, "nbd0") - transferred < distinct + MIB


def test_device_mounted_twice_is_one_superblock_and_one_page_cache(
    guest: Guest, device: str, mounted: str
) -> None:
    guest.python(read_all, mounted)
    cached, transferred = guest.python(cached_bytes), guest.python(nbd_bytes_read, "nbd0")
    guest.do(["mkdir", "/tmp/second"])
    guest.do(["mount", "-t", "erofs", "-o", "ro", device, "/tmp/second"])
    guest.python(read_all, "/tmp/second")
    assert guest.do(["stat", "-c", "%d", mounted]) == guest.do(["stat", "-c", "%d", "/tmp/second"])
    assert guest.python(cached_bytes) - cached < MIB // 10
    assert guest.python(nbd_bytes_read, "nbd0") == transferred
    guest.do("umount /tmp/second && rmdir /tmp/second")


def test_kernels_from_7_know_inode_share(guest: Guest, device: str) -> None:
    options = "ro,inode_share,domain_id=store"
    result = guest.run(["mount", "-t", "erofs", "-o", options, device, "/mnt"])
    assert (result.returncode == 0) == (int(guest.release.split(".")[0]) >= 7)
    guest.run(["umount", "/mnt"])


def distinct_bytes(tree: Path) -> int:
    """Bytes of the files of a tree, each counted once however many names it has."""
    files = [entry for entry in inventory(str(tree)) if entry["type"] == "-"]
    return sum(file["size"] for file in files if file["group"] in {None, file["path"]})


def test_device_let_go_is_free(guest: Guest, device: str) -> None:
    guest.do(["nbd-client", "-d", device])
    guest.do("while [ -e /sys/block/nbd0/pid ]; do sleep 0.05; done", timeout=10)
    assert guest.do(["cat", "/sys/block/nbd0/size"]).strip() == "0"
    assert guest.run("pidof nbd-client").returncode == 1
    guest.do(attach("base", device, *PERSISTENT))


def test_persistent_client_does_not_outlive_its_server(
    guest: Guest, mounted: str, service: Service
) -> None:
    # The kernel returns 0 from NBD_DO_IT when the server goes, which nbd-client 3.24 takes for the
    # end: -persist does nothing. Only a device attached by netlink can be given new connections.
    guest.do(["ls", mounted])
    service.kill()
    try:
        wait_until(lambda: guest.run(["pidof", "nbd-client"]).returncode == 1)
    finally:
        service.start()
    result = guest.run(["dd", f"if={mounted}/large", "of=/dev/null", "bs=128k"])
    assert result.returncode == 1
    assert "Input/output error" in result.stderr
    # While it is mounted, the device keeps its size and the id of a process that is gone.
    assert guest.do(["cat", "/sys/block/nbd0/size"]).strip() != "0"
    assert guest.run("kill -0 $(cat /sys/block/nbd0/pid)").returncode == 1
