"""Remotes as a source of lost contents: a damaged frame that has a place is fetched again.

Owns what is believed of what a remote sends: chunks that are known to be the frame's, with their
digests. A remote that cannot be reached is asked once. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Mapping

from blake3 import blake3

from dedupstore import format as fmt
from dedupstore.env import Environment
from dedupstore.errors import DedupError, RemoteDamagedError, RemoteNotFoundError
from dedupstore.frames import Codecs
from dedupstore.places import Place, find_places
from dedupstore.remote.configuration import find_number
from dedupstore.remote.remote import Remote

Known = Mapping[int, fmt.LostChunk]
"""A frame's chunks by slot; of some the length is 0, not known."""


class RemoteFrames:
    """The remotes that a store knows."""

    def __init__(self, env: Environment, codecs: Codecs) -> None:
        self._env = env
        self._codecs = codecs
        self._remotes: dict[int, Remote] = {}
        self._unreachable: set[int] = set()

    def record(self, frame: int, known: Known) -> bytearray | None:
        """The unsealed record of a frame with all chunks that are known to be its, from where one
        of its places says; None: it cannot be had."""
        for place in self.places(frame) if known else ():
            if place.remote in self._unreachable:
                continue
            try:
                remote = self._remotes.setdefault(
                    place.remote, find_number(self._env, place.remote)
                )
                return self._rebuilt(remote.read(place.pack, place.offset, place.length), known)
            except (RemoteNotFoundError, RemoteDamagedError):
                continue  # of this pack; others may be there
            except DedupError:
                self._unreachable.add(place.remote)
        return None

    def is_unreachable(self, frame: int) -> bool:
        """Whether a remote that may have a frame could not be asked."""
        return any(place.remote in self._unreachable for place in self.places(frame))

    def places(self, frame: int) -> tuple[Place, ...]:
        """Where a frame's bytes are, as far as that is known."""
        remote = self._env.remote
        if remote is None:
            return ()
        try:
            with self._env.read() as txn:
                found = find_places(txn, remote, frame)
        except DedupError:
            return ()
        return found.places if found is not None else ()

    def _rebuilt(self, sent: bytes, known: Known) -> bytearray:
        """Raises RemoteDamagedError unless every chunk of `known` is there."""
        try:
            fmt.verify_frame(sent, 0)
            slots = fmt.decode_frame_header(sent, 0).slots
            raw = self._codecs.decode(memoryview(sent), 0)
        except DedupError as error:
            raise RemoteDamagedError(str(error)) from None
        if max(known) >= len(slots):
            raise RemoteDamagedError("a frame in it has too few chunks")
        kept: list[bytes] = []
        fresh = [fmt.DROPPED] * len(slots)
        position = 0
        for at, slot in enumerate(slots):
            piece = raw[position : position + slot.length]
            position += slot.length
            if at in known:
                if blake3(piece).digest() != known[at].digest:
                    raise RemoteDamagedError("a chunk in it does not have its digest")
                fresh[at] = fmt.Slot(known[at].digest, len(piece))
                kept.append(piece)
        return self._codecs.encode(fresh, b"".join(kept))
