"""Control over the recordings of a running server, through its metrics socket.

Owns the client's side of `/trace/<image digest>` (`nbdplugin.metrics` has the server's). Any number
of objects may be used at once; one belongs to one thread.
"""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

from dedupstore.errors import RecordingError, TraceError
from dedupstore.traces import Trace, decode_trace

CHUNKS_HEADER = "X-Dedupstore-Chunks"
_SECONDS = 60.0


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class ServerRecording:
    """The recording of one image in a server. Every method raises RecordingError when there is no
    server, or it does not do what it is asked."""

    def __init__(self, metrics: Path, name: str, digest: str) -> None:
        """`metrics` is the server's socket, `name` what the image is called in messages."""
        self._metrics = metrics
        self._name = name
        self._path = f"/trace/{digest}"

    def begin(self) -> None:
        """Begin the recording."""
        self._ask("PUT")

    def chunks(self) -> int:
        """How many chunks were noted. A recording that nobody asks about for a minute ends."""
        return int(self._ask("HEAD")[1] or 0)

    def trace(self) -> Trace:
        """What was recorded so far."""
        try:
            return decode_trace(self._ask("GET")[0])
        except TraceError as error:
            raise RecordingError(f"{self._metrics}: sends no trace: {error.reason}") from None

    def end(self) -> None:
        """End the recording and forget it."""
        self._ask("DELETE")

    def _ask(self, method: str) -> tuple[bytes, str | None]:
        connection = _Connection(self._metrics)
        try:
            connection.request(method, self._path)
            answer = connection.getresponse()
            body, chunks = answer.read(), answer.getheader(CHUNKS_HEADER)
        except (FileNotFoundError, ConnectionRefusedError):
            raise RecordingError(
                f"{self._metrics}: no server runs there that could record (mount {self._name!r}, "
                "or give the --metrics of its server)"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RecordingError(f"{self._metrics}: the server does not answer: {reason}") from None
        finally:
            connection.close()
        if answer.status == http.HTTPStatus.NOT_FOUND:
            reason = "does not serve" if method == "PUT" else "no longer records"
            raise RecordingError(f"{self._metrics}: this server {reason} image {self._name!r}")
        if answer.status != http.HTTPStatus.OK:
            said = body.decode(errors="replace").strip() or str(answer.status)
            raise RecordingError(f"image {self._name!r}: {said}")
        return body, chunks
