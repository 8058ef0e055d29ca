"""A small HTTP server for tests, whose answers a test decides: what no real server can be made to
do on demand. Objects are in a dictionary; conditions are passed over unless `conditional`."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

Answer = Callable[["Handler"], bool]
"""Answers a request; False: the server shall."""


@dataclass
class ObjectServer:
    """What the server has, and what it was asked: "METHOD path"."""

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    conditional: bool = False


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ours: ObjectServer

    def _serve(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.ours.asked.append(f"{self.command} {path}")
        if self.ours.answers and self.ours.answers.pop(0)(self):
            return
        objects = self.ours.objects
        if self.command == "PUT":
            create = self.headers.get("If-None-Match") == "*"
            if self.ours.conditional and create and path in objects:
                self.answer(HTTPStatus.PRECONDITION_FAILED)
                return
            objects[path] = body
            self.answer(HTTPStatus.OK, data=body, empty=True)
        elif self.command == "POST":  # S3's deletion of several
            keys = re.findall(r"<Key>([^<]*)</Key>", body.decode())
            for key in keys:
                objects.pop(f"{path}/{key}", None)
            gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self.answer(HTTPStatus.OK, data=f"<DeleteResult>{gone}</DeleteResult>".encode())
        elif path not in objects:
            self.answer(HTTPStatus.NOT_FOUND)
        else:
            self._get(objects[path])

    def _get(self, data: bytes) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None:
            self.answer(HTTPStatus.OK, data=data)
            return
        first, last = int(span[1]), min(int(span[2]), len(data) - 1)
        where = f"bytes {first}-{last}/{len(data)}"
        part = data[first : last + 1]
        self.answer(HTTPStatus.PARTIAL_CONTENT, data=part, headers={"Content-Range": where})

    def answer(
        self,
        status: int,
        *,
        data: bytes = b"",
        headers: dict[str, str] | None = None,
        empty: bool = False,
        length: int | None = None,
    ) -> bool:
        """Answer; `length` is what the head claims of the body, if that is another."""
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 21:17:00 GMT")
        body = b"" if empty or self.command == "HEAD" else data
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if length is not None:
            self.close_connection = True
        return True

    do_GET = do_PUT = do_POST = do_HEAD = _serve  # noqa: N815 - the library finds them by name

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """A server on a free port of the loopback."""
    ours = ObjectServer()
    handler = type("OurHandler", (Handler,), {"ours": ours})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        ours.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield ours
        finally:
            server.shutdown()
            thread.join()
