"""Carries connections from a TCP port of this machine to a unix socket, for guests: their network
reaches ports only.

Each connection has two threads. A connection whose unix socket does not answer is closed. The port
is one of 127.0.0.1, so every user of the machine can connect while the guest runs.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

_BUFFER_BYTES = 1 << 20


class Forwarder:
    """Listens from construction to `close`."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections, and end those there are."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        for connection in (self._listener, *connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, socket.socket(socket.AF_UNIX) as far:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                far.connect(str(self._target))
                with self._lock:
                    if self._closed:
                        return
                    self._connections |= {near, far}
                back = threading.Thread(target=_copy, args=(far, near), daemon=True)
                back.start()
                _copy(near, far)
                back.join()
            with self._lock:
                self._connections -= {near, far}


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Carry bytes one way until either end is done; the other then learns it."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(buffer[:count])
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
