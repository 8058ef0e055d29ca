"""A guest that dies says why. In a guest of its own, started before the others."""

from __future__ import annotations

import pytest

from tests.programs import unavailable
from tools.guests.cache import SUITES, UnavailableError
from tools.guests.guest import Guest, GuestError


def test_panic_raises_with_the_consoles_tail() -> None:
    try:
        guest = Guest(SUITES[0], memory_mib=512)
    except UnavailableError as error:
        unavailable(str(error))
    with guest:
        with pytest.raises(GuestError, match=r"(?s)the guest has ended.*Kernel panic.*sysrq"):
            guest.run("echo c >/proc/sysrq-trigger")
        with pytest.raises(GuestError, match="Kernel panic"):  # and goes on saying so
            guest.run(["true"])
