"""Addresses to listen at, as users write them."""

from __future__ import annotations

import pytest

from dedupstore.errors import UsageError
from dedupstore.listening import PORT, TcpAddress, Tls, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1", TcpAddress("10.0.0.1", PORT)),
        ("10.0.0.1:20000", TcpAddress("10.0.0.1", 20000)),
        ("localhost:1", TcpAddress("localhost", 1)),
        ("[::1]", TcpAddress("::1", PORT)),
        ("[fe80::1%eth0]:65535", TcpAddress("fe80::1%eth0", 65535)),
    ],
)
def test_address_is_a_host_and_perhaps_a_port(text: str, address: TcpAddress) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", ":1", "::1", "[::1", "[::1]x", "[::1]1", "[]", "[-x]", "-D", "a:1:2"),
        *("a:", "a:0", "a:-1", "a:b", "a:٣", "a:65536", "a:999999999999"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--tcp"):
        parse_address(text)


def test_nothing_is_served_over_tcp_in_the_clear_unless_asked_for() -> None:
    with pytest.raises(UsageError, match="--tls off serves without"):
        Tls().arguments(over_tcp=True)
    assert Tls(mode="off").arguments(over_tcp=True) == ["--tls=off"]
    assert Tls().arguments(over_tcp=False) == []
