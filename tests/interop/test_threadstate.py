"""nbdplugin.threadstate under the real nbdkit: which thread states live, how long, and how it ends.

Every assertion is a count. The plugin below counts, with the interpreter's own means, and reports
through its export; the client is libnbd's Python binding, which belongs to the distribution's
interpreter and so runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.programs import require_program

CHECKOUT = Path(__file__).parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
PATIENCE_SECONDS = 60  # only a hang takes that long
CONNECTIONS_IN_A_ROW = 100

PLUGIN = """\
import ctypes, itertools, json, os, sys, threading

sys.path.insert(0, os.environ["CHECKOUT"])
from nbdplugin import threadstate
from nbdplugin.threadstate import pin, pinned

import nbdkit

API_VERSION = 2
REPORT_AT = 1 << 20
mode = os.environ["PIN_MODE"]

api = ctypes.pythonapi
api.PyThreadState_Get.restype = ctypes.c_void_p
api.PyThreadState_GetID.argtypes = [ctypes.c_void_p]
api.PyThreadState_GetID.restype = ctypes.c_uint64
api.PyThreadState_Next.argtypes = [ctypes.c_void_p]
api.PyThreadState_Next.restype = ctypes.c_void_p
api.PyInterpreterState_Get.restype = ctypes.c_void_p
api.PyInterpreterState_ThreadHead.argtypes = [ctypes.c_void_p]
api.PyInterpreterState_ThreadHead.restype = ctypes.c_void_p
enter_python_from_c = ctypes.CFUNCTYPE(None)(lambda: None)  # PyGILState_Ensure and _Release

calls, states, threads, scratch_made, scratch_dropped = [], set(), set(), [], []
local = threading.local()


class Scratch:
    def __init__(self):
        scratch_made.append(1)

    def __del__(self):
        if threadstate.active:  # in PyGILState_Release, CPython itself does not survive this
            enter_python_from_c()
        scratch_dropped.append(1)


def states_alive():
    state, alive = api.PyInterpreterState_ThreadHead(api.PyInterpreterState_Get()), 0
    while state:
        state, alive = api.PyThreadState_Next(state), alive + 1
    return alive


def after_fork():
    if mode == "no glibc":
        def confstr(name):
            raise ValueError(name)
        os.confstr = confstr
    if mode != "not installed":
        threadstate.install()
    own = threading.Thread(target=pin)
    own.start()
    own.join()


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    if mode == "everywhere" and not pinned():
        pin()
    return 1


def get_size(h):
    return 2 << 20


def can_multi_conn(h):
    return True


def pread(h, buf, offset, flags):
    if not pinned():
        pin()
    try:
        local.scratch
    except AttributeError:
        local.scratch = Scratch()
    calls.append(1)
    states.add(api.PyThreadState_GetID(api.PyThreadState_Get()))
    threads.add(threading.get_native_id())
    if offset == REPORT_AT:
        report = {
            "active": threadstate.active,
            "calls": len(calls),
            "states": len(states),
            "threads": len(threads),
            "scratch_made": len(scratch_made),
            "scratch_dropped": len(scratch_dropped),
            "states_alive": states_alive(),
        }
        buf[:] = json.dumps(report).encode().ljust(len(buf))
    else:
        buf[:] = bytes([offset >> 12]) * len(buf)
"""

CLIENT = """\
import sys, threading
import nbd

uri, command, *numbers = sys.argv[1:]


def read_in_parallel(h, requests):
    buffers = [(page, nbd.Buffer(4096)) for page in range(requests)]
    cookies = [h.aio_pread(buffer, page << 12) for page, buffer in buffers]
    while h.aio_in_flight():
        h.poll(-1)
    for cookie, (page, buffer) in zip(cookies, buffers):
        assert h.aio_command_completed(cookie)
        assert buffer.to_bytearray() == bytes([page]) * 4096


def connect():
    h = nbd.NBD()
    h.connect_uri(uri)
    return h


def load(ready, reconnect):
    try:
        while True:
            h = connect()
            read_in_parallel(h, 16)
            ready.release()
            while not reconnect:
                read_in_parallel(h, 16)
            h.shutdown()
    except nbd.Error:
        pass  # the server has gone


if command == "read":
    connections, requests = map(int, numbers)
    for _ in range(connections):
        h = connect()
        read_in_parallel(h, requests)
        h.shutdown()
elif command == "report":
    h = connect()
    print(h.pread(4096, 1 << 20).decode())
    h.shutdown()
elif command == "load":
    steady, storming = map(int, numbers)
    ready = threading.Semaphore(0)
    loads = [
        threading.Thread(target=load, args=(ready, i >= steady)) for i in range(steady + storming)
    ]
    for thread in loads:
        thread.start()
    for thread in loads:
        ready.acquire()
    print("ready", flush=True)
    for thread in loads:
        thread.join()
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running nbdkit with the counting plugin."""

    process: subprocess.Popen[str]
    uri: str
    client: Path

    def command(self, *args: str) -> list[str]:
        return [SYSTEM_PYTHON, str(self.client), self.uri, *args]

    def run(self, *args: str) -> str:
        return subprocess.run(
            self.command(*args),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=PATIENCE_SECONDS,
        ).stdout

    def read(self, *, connections: int, requests: int) -> None:
        """Connect one after the other; in each read that many pages, all in flight at once."""
        self.run("read", str(connections), str(requests))

    def report(self) -> dict[str, int]:
        """What the plugin counted, once every earlier connection's threads have ended.

        Waiting for that also keeps threads from vanishing while the plugin walks their states.
        """
        tasks = Path(f"/proc/{self.process.pid}/task")
        wait_until(lambda: len(list(tasks.iterdir())) == 1)
        counts: dict[str, int] = json.loads(self.run("report"))
        return counts

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """The exit status, and all that the server ever printed."""
        self.process.send_signal(how)
        printed, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, printed


StartServer = Callable[..., Server]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    require_program("nbdkit", SYSTEM_PYTHON)
    for probe, package in (
        ([SYSTEM_PYTHON, "-c", "import nbd"], "python3-libnbd"),
        (["nbdkit", "--dump-plugin", "python"], "nbdkit-plugin-python"),
    ):
        if subprocess.run(probe, check=False, capture_output=True).returncode:
            require_program(package)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    plugin, client = tmp_path / "plugin.py", tmp_path / "client.py"
    plugin.write_text(PLUGIN)
    client.write_text(CLIENT)
    settings = {"CHECKOUT": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
    processes: list[subprocess.Popen[str]] = []

    def start(mode: str = "requests", *, threads: int = 4) -> Server:
        socket, pidfile = tmp_path / f"{len(processes)}.sock", tmp_path / f"{len(processes)}.pid"
        process = subprocess.Popen(
            ["nbdkit", "-f", f"-t{threads}", "-U", socket, "-P", pidfile, "python", plugin],
            env=os.environ | settings | {"PIN_MODE": mode},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        wait_until(lambda: pidfile.exists() or process.poll() is not None)
        return Server(process, f"nbd+unix:///?socket={socket}", client)

    yield start
    for process in processes:
        with process:
            process.kill()


def test_pinned_worker_keeps_one_thread_state_for_all_its_callbacks(
    start_server: StartServer,
) -> None:
    server = start_server(threads=4)
    server.read(connections=1, requests=200)
    counts = server.report()
    assert counts["active"]
    assert counts["calls"] == 201
    assert counts["states"] == counts["threads"] <= 4 + 1
    assert counts["scratch_made"] == counts["threads"]
    assert server.stop() == (0, "")


@pytest.mark.parametrize("mode", ["not installed", "no glibc"])
def test_without_pinning_reads_still_work_and_every_callback_gets_a_new_thread_state(
    start_server: StartServer, mode: str
) -> None:
    server = start_server(mode)
    server.read(connections=1, requests=200)
    counts = server.report()
    assert not counts["active"]
    assert counts["calls"] == counts["states"] == counts["scratch_made"] == 201
    assert counts["states_alive"] == 2
    assert server.stop() == (0, "")


@pytest.mark.parametrize(
    ("mode", "threads"),
    [
        pytest.param("requests", 4, id="workers"),
        pytest.param("requests", 1, id="connection-threads"),
        pytest.param("everywhere", 4, id="both"),
    ],
)
def test_every_thread_state_is_given_back_when_its_thread_ends(
    start_server: StartServer, mode: str, threads: int
) -> None:
    server = start_server(mode, threads=threads)
    server.read(connections=CONNECTIONS_IN_A_ROW, requests=16)
    counts = server.report()
    assert counts["active"]
    assert counts["states"] == counts["scratch_made"] >= CONNECTIONS_IN_A_ROW
    # The main thread's, and those of the connection that reports.
    assert counts["states_alive"] == (3 if mode == "everywhere" else 2)
    assert counts["scratch_dropped"] == counts["scratch_made"] - 1
    assert server.stop() == (0, "")


@pytest.mark.parametrize(
    ("how", "threads"),
    [
        (signal.SIGTERM, 4),
        (signal.SIGTERM, 1),
        (signal.SIGINT, 4),
        (signal.SIGHUP, 4),
        (signal.SIGQUIT, 4),
    ],
)
def test_signal_under_load_ends_the_server_silently_with_status_0(
    start_server: StartServer, how: signal.Signals, threads: int
) -> None:
    server = start_server("everywhere", threads=threads)
    with subprocess.Popen(
        server.command("load", "8", "4"), stdout=subprocess.PIPE, text=True
    ) as clients:
        assert clients.stdout is not None
        assert clients.stdout.readline() == "ready\n"
        assert server.stop(how) == (0, "")
        assert clients.wait(PATIENCE_SECONDS) == 0
