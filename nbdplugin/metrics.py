"""Prometheus metrics of a running server, and control over its recordings, on a unix socket.

    curl --unix-socket PATH http://localhost/metrics

Owns the names and meanings of the metrics; the exposition format and HTTP are prometheus_client's
and the standard library's. A client that connects and sends nothing gets the bare text. Scrapes run
on one thread of their own and read plain integers: they neither lock nor slow the serving threads.

`/trace/<image digest>` is for `dedupstore trace record` (`dedupstore.control`): PUT begins a
recording, GET gives the trace so far, HEAD the number of its chunks, DELETE ends it. The socket is
its owner's alone.
"""

from __future__ import annotations

import os
import re
import socket
import socketserver
import stat
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from dedupstore.control import CHUNKS_HEADER
from dedupstore.errors import DedupError, ImageNotFoundError, RecordingError, TargetError
from dedupstore.remote.counters import FetchCounters
from nbdplugin.session import Session

_REQUEST_SECONDS_MAX = 0.5
# How long stopping the server may have to wait for this thread to look up.
_STOP_SECONDS_MAX = 0.1
_TRACE_PATH = re.compile("/trace/([0-9a-f]{64})")
_STATUS = {
    ImageNotFoundError: HTTPStatus.NOT_FOUND,
    RecordingError: HTTPStatus.CONFLICT,
}


class _SessionCollector(Collector):
    """One scrape's reading of the session's counters."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def collect(self) -> Iterator[Metric]:
        session, cache, counters = self._session, self._session.cache, self._session.counters
        for name, text, value in (
            ("dedup_cache_hits", "Frame look-ups served from the cache.", counters.hits),
            ("dedup_cache_misses", "Frame look-ups that had to wait for a load.", cache.misses),
            ("dedup_cache_evictions", "Frames dropped to hold the byte budget.", cache.evictions),
            ("dedup_cache_prefetches", "Frames loaded ahead of readers.", counters.prefetches),
            ("dedup_store_reads", "Chunks loaded from LMDB.", session.loader.chunks_loaded),
            ("dedup_store_frame_reads", "Frames loaded from LMDB.", session.loader.frames_loaded),
            ("dedup_read_bytes", "Bytes asked for by clients.", counters.bytes),
            ("dedup_read_errors", "Reads answered with an error.", counters.errors),
            *_fetched(session),
        ):
            yield CounterMetricFamily(name, text, value=value)
        for name, text, value in (
            ("dedup_cache_bytes", "Bytes held by the cache, overhead included.", cache.bytes),
            ("dedup_cache_frames", "Frames held by the cache.", len(cache.entries)),
            ("dedup_exports_open", "Exports that clients have open.", session.open_exports),
        ):
            yield GaugeMetricFamily(name, text, value=value)


def _fetched(session: Session) -> Iterator[tuple[str, str, float]]:
    """The counters of what came from remotes; zeros until something has to."""
    fetching = session.store.fetching
    fetched = FetchCounters() if fetching is None else fetching.counters
    stored, unstored = (0, 0) if fetching is None else fetching.kept
    yield "dedup_remote_requests", "Range requests that remotes answered.", fetched.requests
    yield "dedup_remote_bytes", "Bytes fetched from remotes.", fetched.bytes
    yield "dedup_remote_frames", "Frames fetched from remotes.", fetched.frames
    yield "dedup_remote_errors", "Fetches that failed on every mirror.", fetched.errors
    yield "dedup_remote_seconds", "Time spent waiting for remotes, summed.", fetched.seconds
    yield "dedup_remote_stored", "Fetched frames that were stored.", stored
    ahead = 0 if session.background is None else session.background.bytes
    yield "dedup_background_bytes", "Bytes of chunks fetched that nobody had asked for.", ahead
    yield "dedup_remote_unstored", "Fetched frames that could not be stored.", unstored


class _Handler(socketserver.StreamRequestHandler):
    """Answers HTTP with prometheus_client's handler, and silence with the bare text."""

    server: _Server

    def handle(self) -> None:
        self.request.settimeout(_REQUEST_SECONDS_MAX)
        try:
            silent = not self.request.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            silent = True
        try:
            if silent:
                self.wfile.write(generate_latest(self.server.registry))
            else:
                self.server.http(self.request, ("local", 0), self.server)
        except OSError:
            return  # the scraper went away


class _Http(MetricsHandler):
    """prometheus_client's handler, silent: nbdkit's log is for failures; and recordings'."""

    server: _Server

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:  # noqa: N802 - of http.server
        if self._is_trace():
            self._answer(self._trace)
        else:
            super().do_GET()

    def do_HEAD(self) -> None:  # noqa: N802 - of http.server
        self._answer(lambda image: str(self.server.session.recordings.chunks(image)).encode())

    def do_PUT(self) -> None:  # noqa: N802 - of http.server
        self._answer(self._begin)

    def do_DELETE(self) -> None:  # noqa: N802 - of http.server
        self._answer(self._end)

    def _is_trace(self) -> bool:
        return _TRACE_PATH.fullmatch(self.path) is not None

    def _answer(self, act: Callable[[bytes], bytes]) -> None:
        """Do what is asked of the image in the path; the answer's body is the result, or one line
        of what is wrong. To HEAD it is a header."""
        named = _TRACE_PATH.fullmatch(self.path)
        status, body = HTTPStatus.NOT_FOUND, b"no such path\n"
        if named is not None:
            try:
                status, body = HTTPStatus.OK, act(bytes.fromhex(named[1]))
            except DedupError as error:
                status = _STATUS.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR)
                body = f"{error}\n".encode()
        self.send_response(status)
        if self.command == "HEAD":
            self.send_header(CHUNKS_HEADER, body.decode().strip())
            body = b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _begin(self, image: bytes) -> bytes:
        session = self.server.session
        if not session.serves(image):
            raise ImageNotFoundError(image.hex())
        session.recordings.begin(image)
        return b""

    def _trace(self, image: bytes) -> bytes:
        from dedupstore.traces import encode_trace  # noqa: PLC0415 - for recordings only

        return encode_trace(self.server.session.recordings.trace(image))

    def _end(self, image: bytes) -> bytes:
        self.server.session.recordings.end(image)
        return b""


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    session: Session
    registry: CollectorRegistry
    http: type[_Http]


class MetricsServer:
    """Serves a session's metrics until `close`."""

    def __init__(self, path: Path, session: Session) -> None:
        """Bind `path`, replacing a socket that a dead server left. Raises TargetError."""
        registry = CollectorRegistry()
        registry.register(_SessionCollector(session))
        try:
            if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
                path.unlink()
            mask = os.umask(0o177)  # nobody else, not even until a chmod
            try:
                self._server = _Server(str(path), _Handler)
            finally:
                os.umask(mask)
        except OSError as error:
            raise TargetError(f"metrics={path}: {error.strerror}") from None
        self._path = path
        self._server.session = session
        self._server.registry = registry
        self._server.http = _Http.factory(registry)
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            args=(_STOP_SECONDS_MAX,),
            name="metrics",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and remove the socket."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._path.unlink(missing_ok=True)
