"""Ends the server on a signal: what clients have asked for is answered, then they are hung up on.

nbdkit (1.32) by itself does neither. A connection that waits for its client's next request learns
of the signal only when that client hangs up: with a device attached, never, until whoever stopped
the server kills it. What had been asked for by then stays without an answer, which a kernel finds
out by its timeout; and what is asked for after it is answered with ESHUTDOWN, which a kernel
hands to whoever reads. So the signals go to a thread here instead, which

1. puts a pipe nobody writes to in the place of the listening sockets: nobody else is let in. Those
   that systemd opened stay open there, and clients wait in them for the next server;
2. ends the receiving direction of every client's socket: nbdkit reads and answers what has arrived,
   then finds the end and closes. A client that goes on sending learns it at once;
3. when all are gone, has nbdkit end.

`install` is called once, from the main thread before it starts others: they inherit its mask.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Those that nbdkit ends on.
_SIGNALS = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP})
# For answers on their way to clients that take them.
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.005
_STANDARD_FDS = 3  # which may be sockets too, of the journal


def install(shut_down: Callable[[], None]) -> None:
    """Take the signals. On the first, hang up, wait until clients have their answers or the grace
    is over, and call `shut_down` (nbdkit's)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_end, args=(shut_down,), daemon=True).start()


def _end(shut_down: Callable[[], None]) -> None:
    signal.sigwait(_SIGNALS)
    deadline = time.monotonic() + _GRACE_SECONDS
    _stop_listening()
    while _hang_up(socket.SHUT_RD) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    _hang_up(socket.SHUT_RDWR)  # no answer is better than one that says ESHUTDOWN
    shut_down()


def _stop_listening() -> None:
    silence, _kept_open = os.pipe()
    for descriptor, opened in _streams():
        if _listens(opened):
            os.dup2(silence, descriptor, inheritable=False)


def _hang_up(how: int) -> bool:
    """End a direction of every connection; False if there is none."""
    found = False
    for _, opened in _streams():
        if not _listens(opened):
            found = True
            with contextlib.suppress(OSError):  # gone
                opened.shutdown(how)
    return found


def _streams() -> Iterator[tuple[int, socket.socket]]:
    """This process's stream sockets: descriptors, and what is behind them. Nobody tells a plugin
    which they are; besides nbdkit's only the metrics' are such."""
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            if int(path.name) < _STANDARD_FDS or not stat.S_ISSOCK(path.stat().st_mode):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as opened:
                if opened.type == socket.SOCK_STREAM:
                    yield int(path.name), opened


def _listens(opened: socket.socket) -> bool:
    return opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
