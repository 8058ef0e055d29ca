"""What a store must hold, whatever was killed.

The model is names and what their images are. A command has an *effect*: names that it gives or
takes away, all at once. Once it has reported that it is done the effect must be there; if it was
killed before, whole or not at all; and a name that it does not touch stays what it was. A command
that printed its result has reported it, even if it was killed before it could exit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tools.crashes.corpus import Source
from tools.crashes.observed import Observed

Effect = dict[str, str | None]
"""Name -> key of the source that it is an image of; None: no such name."""


class InvariantError(Exception):
    """The store is not what it must be."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a round. `uses` are names that nobody else may touch meanwhile; `exports` is
    the file that it writes, and the key of the image."""

    kind: str
    words: tuple[str, ...]
    effect: Effect = field(default_factory=dict)
    uses: frozenset[str] = frozenset()
    stdin: Path | None = None
    exports: tuple[Path, str] | None = None
    label: str = ""

    @property
    def touches(self) -> set[str]:
        return set(self.effect) | self.uses


@dataclass(slots=True)
class Model:
    """What the store holds now, and the commands that made it so, in an order in which they could
    have run one after the other."""

    sources: dict[str, Source]
    names: dict[str, str] = field(default_factory=dict)
    history: list[tuple[str, ...]] = field(default_factory=list)

    def settle(self, command: Command, *, done: bool, observed: Observed) -> bool:
        """Take in a command that has ended; returns whether its effect is there.

        Raises InvariantError: it is not although it must be, or it is there in part.
        """
        if not command.effect:
            if done:
                self.apply(command)
            return done
        now = {name: name in observed.images for name in command.effect}
        whole = {name: key is not None for name, key in command.effect.items()}
        absent = {name: name in self.names for name in command.effect}
        if now == whole:
            self.apply(command)
            return True
        if done:
            raise InvariantError(f"done, but not there: {command.words}: {now}")
        if now != absent:
            raise InvariantError(f"there in part: {command.words}: {now}")
        return False

    def apply(self, command: Command) -> None:
        """Take in a command that is done."""
        for name, key in command.effect.items():
            if key is None:
                del self.names[name]
            else:
                self.names[name] = key
        if command.effect or command.kind in {"gc", "compact", "evict"}:
            self.history.append(command.words)

    def hold_against(self, observed: Observed) -> int:
        """Compare everything; returns the bytes that were compared. Raises InvariantError."""
        if observed.findings:
            raise InvariantError(f"check: {'; '.join(observed.findings[:5])}")
        if set(observed.images) != set(self.names):
            missing = sorted(set(self.names) - set(observed.images))
            excess = sorted(set(observed.images) - set(self.names))
            raise InvariantError(f"names lost: {missing}; that should not be there: {excess}")
        for name, key in self.names.items():
            content = observed.contents[observed.images[name]]
            if content != self.sources[key].sha256:
                raise InvariantError(f"image {name!r} differs from its source {key}")
        if observed.leftovers:
            raise InvariantError(f"temporary files: {observed.leftovers}")
        return observed.bytes
