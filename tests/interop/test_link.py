"""The link that remotes are tested through: what it promises to those tests (tools/ondemand)."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.conftest import noise
from tests.interop.rig import CHECKOUT, wait_until
from tests.programs import require_program
from tools.ondemand import servers
from tools.ondemand.exchanges import Request
from tools.ondemand.link import Link
from tools.ondemand.mischief import KINDS

Connect = Callable[..., http.client.HTTPConnection]
DATA = noise(1, 300_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Served]:
    require_program("nginx")
    work = tmp_path_factory.mktemp("nginx")
    (work / "root").mkdir()
    (work / "root" / "data").write_bytes(DATA)
    with servers.nginx(work / "root", work / "nginx") as running:
        yield running


@pytest.fixture
def link(server: servers.Served) -> Iterator[Link]:
    with Link(server.port) as made:
        yield made


def get(client: http.client.HTTPConnection, first: int, last: int) -> tuple[int, bytes]:
    client.request("GET", "/data", headers={"Range": f"bytes={first}-{last}"})
    answer = client.getresponse()
    return answer.status, answer.read()


@pytest.fixture
def connect(link: Link) -> Iterator[Connect]:
    with ExitStack() as stack:

        def connect(timeout: float = 60) -> http.client.HTTPConnection:
            client = http.client.HTTPConnection("127.0.0.1", link.port, timeout=timeout)
            return stack.enter_context(closing(client))

        yield connect


def test_requests_are_counted_across_kept_connections(link: Link, connect: Connect) -> None:
    client = connect()
    for at in range(0, 5000, 1000):
        assert get(client, at, at + 999) == (206, DATA[at : at + 1000])
    assert get(connect(), 0, len(DATA) - 1) == (206, DATA)
    counters = link.counters(reset=True)
    assert (counters.connections, counters.requests) == (2, 6)
    assert counters.bytes_down > 5000 + len(DATA)
    assert link.counters().requests == 0


def test_requests_are_told_with_their_ranges(link: Link, connect: Connect) -> None:
    get(connect(), 7, 9)
    assert link.requests() == [Request("GET", "/data", "bytes=7-9")]


def test_bodies_of_puts_are_no_requests(link: Link, connect: Connect) -> None:
    client = connect()
    client.request("PUT", "/data", b"GET /x HTTP/1.1\r\n\r\n" * 5000)
    assert client.getresponse().status == 405
    assert link.counters().requests == 1


def test_a_narrow_link_with_delay_changes_no_byte(link: Link, connect: Connect) -> None:
    link.shape(rtt=0.004, rate=4e6)
    assert get(connect(), 0, len(DATA) - 1) == (206, DATA)


def test_flip_changes_one_bit(link: Link, connect: Connect) -> None:
    link.strike("flip")
    status, data = get(connect(), 0, len(DATA) - 1)
    assert (status, len(data)) == (206, len(DATA))
    wrong = int.from_bytes(data, "little") ^ int.from_bytes(DATA, "little")
    assert wrong.bit_count() == 1


def test_truncate_and_reset_end_a_body_early(link: Link, connect: Connect) -> None:
    link.strike("truncate")
    with pytest.raises(http.client.IncompleteRead):
        get(connect(), 0, len(DATA) - 1)
    link.strike("reset")
    with pytest.raises(ConnectionResetError):
        get(connect(), 0, len(DATA) - 1)


def test_error_answers_never_reach_the_server(link: Link, connect: Connect) -> None:
    link.strike("503")
    link.strike("500")
    assert get(connect(), 0, 9) == (503, b"")
    assert get(connect(), 0, 9) == (500, b"")
    assert link.counters().bytes_up == 0


def test_trickle_brings_the_whole_body(link: Link, connect: Connect) -> None:
    link.strike("trickle")
    assert get(connect(), 0, 999) == (206, DATA[:1000])


def test_hang_and_refuse_answer_nothing(link: Link, connect: Connect) -> None:
    link.strike("hang")
    with pytest.raises(TimeoutError):
        get(connect(timeout=0.2), 0, 9)
    link.strike("refuse")
    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        get(connect(), 0, 9)


def test_a_link_that_is_down_refuses_until_it_is_up(link: Link, connect: Connect) -> None:
    kept = connect()
    get(kept, 0, 9)
    link.down()
    with pytest.raises(OSError, match="Connection"):
        get(kept, 0, 9)
    with pytest.raises(ConnectionRefusedError):
        get(connect(), 0, 9)
    link.up()
    assert get(connect(), 0, 9) == (206, DATA[:10])


def test_faults_strike_only_what_matches(link: Link, connect: Connect) -> None:
    link.strike("500", match="GET /other")
    assert get(connect(), 0, 9)[0] == 206
    assert link.counters().faults == {}


def test_chaos_is_the_same_for_the_same_seed(link: Link, connect: Connect) -> None:
    def statuses() -> list[int]:
        link.chaos(0.5, ["500", "503"], seed=3)
        return [get(connect(), 0, 9)[0] for _ in range(20)]

    first = statuses()
    assert {206, 500, 503} == set(first)
    assert statuses() == first
    link.clear()
    assert get(connect(), 0, 9)[0] == 206


def test_a_fault_that_is_not_known_is_refused(link: Link) -> None:
    with pytest.raises(ValueError, match=", ".join(KINDS)):
        link.strike("earthquake")


def test_servers_and_links_end_with_a_starter_that_is_killed(tmp_path: Path) -> None:
    require_program("nginx")
    script = f"""
import os, sys, time
from pathlib import Path
from tools.ondemand import servers
from tools.ondemand.link import Link
with servers.nginx(Path({str(tmp_path)!r}), Path({str(tmp_path / "work")!r})) as s:
    link = Link(s.port)
    print(s.port, link.port, flush=True)
    time.sleep(600)
"""
    starter = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    assert starter.stdout is not None
    with starter, starter.stdout:
        ports = [int(word) for word in starter.stdout.readline().split()]
        starter.kill()
    assert len(ports) == 2
    wait_until(lambda: not any(servers.connects(port) for port in ports))
