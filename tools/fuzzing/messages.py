"""What a refusal must look like, whatever was refused."""

from __future__ import annotations

from dedupstore.errors import DedupError

_CHARACTERS_MAX = 2000


def check_message(error: DedupError) -> None:
    """Assert that it is one line that a terminal can show."""
    message = str(error)
    assert message, type(error)
    assert message.isprintable(), message[:_CHARACTERS_MAX]
    assert len(message) <= _CHARACTERS_MAX, message[:_CHARACTERS_MAX]
