"""Prometheus metrics of a running server, on a unix socket.

    curl --unix-socket PATH http://localhost/metrics

Owns the names and meanings of the metrics; the exposition format and HTTP are prometheus_client's
and the standard library's. A client that connects and sends nothing gets the bare text. Scrapes run
on one thread of their own and read plain integers: they neither lock nor slow the serving threads.
"""

from __future__ import annotations

import socket
import socketserver
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from dedupstore.errors import TargetError
from nbdplugin.session import Session

_REQUEST_SECONDS_MAX = 0.5
# How long stopping the server may have to wait for this thread to look up.
_STOP_SECONDS_MAX = 0.1


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
        ):
            yield CounterMetricFamily(name, text, value=value)
        for name, text, value in (
            ("dedup_cache_bytes", "Bytes held by the cache, overhead included.", cache.bytes),
            ("dedup_cache_frames", "Frames held by the cache.", len(cache.entries)),
            ("dedup_exports_open", "Exports that clients have open.", session.open_exports),
        ):
            yield GaugeMetricFamily(name, text, value=value)


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
    """prometheus_client's handler, silent: nbdkit's log is for failures."""

    def log_message(self, *_: object) -> None:
        return


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
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
            self._server = _Server(str(path), _Handler)
            path.chmod(0o600)
        except OSError as error:
            raise TargetError(f"metrics={path}: {error.strerror}") from None
        self._path = path
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
