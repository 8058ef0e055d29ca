"""HTTP/1.1 as a link sees it: where requests begin and end, and where an answer's body is.

Enough to count requests and to put faults into bodies: no pipelining (no client of ours does it),
no TLS. A connection that does not look like HTTP is passed through uncounted. Never raises for
what peers send. Not thread-safe."""

from __future__ import annotations

from dataclasses import dataclass

_HEAD_BYTES_MAX = 64 << 10
_HEAD_END = b"\r\n\r\n"
_CHUNKED_END = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Request:
    """A request line, and the range that is asked for ("" for all)."""

    method: str
    target: str
    range: str = ""


def _headers(head: bytes) -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, _, value in lines}


def _length(headers: dict[bytes, bytes]) -> int:
    text = headers.get(b"content-length", b"")
    return int(text) if text.isdigit() else 0


class Requests:
    """The client's half of a connection."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self._chunked = False
        self._raw = False

    @property
    def complete(self) -> bool:
        """Whether what was asked has been said to its end."""
        return not (self._head or self._left or self._chunked)

    def feed(self, data: bytes) -> tuple[Request | None, bytes]:
        """Take what the client sent: the request that it begins, if it does, and what to pass on:
        nothing while a head is not complete."""
        if self._raw:
            return None, data
        if self._left or self._chunked:
            self._body(data)
            return None, data
        self._head += data
        end = self._head.find(_HEAD_END)
        if end < 0:
            if len(self._head) <= _HEAD_BYTES_MAX:
                return None, b""
            self._raw = True
        whole, self._head = self._head, b""
        words = whole[: whole.find(b"\r\n")].decode("latin-1").split(" ")
        if self._raw or len(words) != 3:
            self._raw = True
            return None, whole
        headers = _headers(whole[:end])
        self._left = _length(headers)
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._body(whole[end + len(_HEAD_END) :])
        return Request(words[0], words[1], headers.get(b"range", b"").decode("latin-1")), whole

    def _body(self, data: bytes) -> None:
        self._left = max(0, self._left - len(data))
        if self._chunked and data.endswith(_CHUNKED_END):
            self._chunked = False


class Answer:
    """The server's answer to one request: where in what it sends the body is."""

    def __init__(self) -> None:
        self._head = b""
        self._in_body = False
        self.length = 0  # of the body, bytes, as the head announces it
        self.seen = 0  # of the body, bytes

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Take what the server sent: head to pass on (empty while it is not complete), and body."""
        if self._in_body:
            self.seen += len(data)
            return b"", data
        self._head += data
        end = self._head.find(_HEAD_END) + len(_HEAD_END)
        if end < len(_HEAD_END):
            return b"", b""
        head, body, self._head = self._head[:end], self._head[end:], b""
        if head.startswith(b"HTTP/1.1 1"):  # 100 Continue: the answer is still to come
            after, body = self.feed(body)
            return head + after, body
        self._in_body = True
        self.length = _length(_headers(head))
        self.seen = len(body)
        return head, body
