"""A directory over HTTP, with ranges, as any web server gives it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """The URL of a directory while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = directory / self.path.lstrip("/")
            if not path.is_file():
                self._answer(404, b"", {})
                return
            data = path.read_bytes()
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if found is None:
                self._answer(200, data, {})
                return
            begin, end = int(found[1]), min(int(found[2]) + 1, len(data))
            span = {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
            self._answer(206, data[begin:end], span)

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
