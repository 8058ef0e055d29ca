"""Bringing frames from remotes when they are read: each once, verified, then kept.

Owns which frames are on their way, which come together, and what is done when a remote fails.
Threads of a process share flights; processes on one store share claims (`leases.FetchClaims`), so a
host fetches a frame once. What came is served at once and stored by `keeping`. Thread-safe.
docs/concurrency.md, "Fetching".
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from dedupstore import format as fmt, places
from dedupstore.env import Environment
from dedupstore.errors import (
    ChunkDamagedError,
    DedupError,
    RemoteDamagedError,
    RemoteError,
    RemoteNotFoundError,
)
from dedupstore.frames import Codecs, read_frame, read_head
from dedupstore.leases import FetchClaims
from dedupstore.places import Place, PlaceRecord
from dedupstore.remote.configuration import find_number
from dedupstore.remote.counters import FetchCounters
from dedupstore.remote.grouping import BULK, Pace, Wanted, groups, runs
from dedupstore.remote.keeping import Keeper
from dedupstore.remote.receiving import received
from dedupstore.remote.remote import Remote
from dedupstore.remote.streams import PASSED_FRAMES_MAX, REQUEST_BYTES_MAX, Stream, Streams
from dedupstore.remote.workers import Workers

# A request brings no more than comes in this time as fast as the last ones did: nobody waits long
# for what he did not want.
_REQUEST_SECONDS = 0.5
# Frames that are looked at for what comes next, here already or not.
_AHEAD_FRAMES_MAX = 64
# How long a reader waits, and the fetches for readers at a time. Devices wait a little longer
# (mounts.nbd).
_READ_SECONDS = 25
_DEMANDS = 32
# What is fetched before anybody asks (`ahead`): enough to fill the link, and few to wait for when
# the command ends.
_EARLY = 3
_STOP_SECONDS = 2.0
# How long to wait for a frame that another process fetches, and how often to look.
_OTHERS_SECONDS = 20.0
_LOOK_SECONDS = 0.004
# After a remote has failed a read, others that need it fail at once, with the same cause, for so
# long: each would wait for the same deadline.
_FAILING_SECONDS = 2.0


@dataclass(eq=False, slots=True)
class _Flight:
    """A frame on its way: whoever needs it waits for it."""

    done: threading.Event = field(default_factory=threading.Event)
    record: fmt.Buffer | None = None
    error: DedupError | None = None


class Fetcher:
    """Fetches frames of one store. Not to be used across a fork."""

    def __init__(self, env: Environment, store: Path, touched: set[int]) -> None:
        """`touched` gets the numbers of frames that are used (see `Keeper`). Raises
        StoreAccessError."""
        self.counters = FetchCounters()
        self._env = env
        self._claims = FetchClaims(store)
        self.keeper = Keeper(env, touched, self._claims.release)
        self._codecs = Codecs()
        self._lock = threading.Lock()
        self._flights: dict[int, _Flight] = {}
        self._remotes: dict[int, Remote] = {}
        self._streams = Streams()
        # By the first frame of what was fetched ahead: where the next part begins.
        self._marks: dict[int, tuple[int, Stream]] = {}
        self._failed: dict[int, tuple[float, str]] = {}
        # Readers wait for these no longer than _READ_SECONDS; what comes later is stored all the
        # same.
        self._demands = Workers(_DEMANDS)
        self._early = Workers(_EARLY)
        self._closing = False
        self._bytes_per_second = float(REQUEST_BYTES_MAX)

    def close(self) -> None:
        """Store what has come. Nobody may be waiting; what is still under way is
        waited for a moment, and fetched again some day if that was too short."""
        self._closing = True
        self._early.close(_STOP_SECONDS)
        self._demands.close(_STOP_SECONDS)
        self.keeper.close()
        self._claims.close()

    @property
    def kept(self) -> tuple[int, int]:
        """Frames that were stored, and that could not be."""
        return self.keeper.stored, self.keeper.unstored

    # --- one frame, now ---

    def fetch(self, frame: int) -> fmt.Buffer:
        """The record of a frame that was seen without its bytes, with them. Does not wait for it to
        be stored. Raises RemoteError, ChunkDamagedError."""
        deadline = time.monotonic() + _READ_SECONDS
        while True:
            flight, leading = self._join(frame)
            if leading:
                self._demands.run(partial(self._lead, frame))
            if not flight.done.wait(deadline - time.monotonic()):
                raise RemoteError(f"no answer from the remote for {_READ_SECONDS} seconds")
            if flight.record is not None:
                return flight.record
            if flight.error is not None:
                raise _copy(flight.error)

    def _join(self, frame: int) -> tuple[_Flight, bool]:
        """The flight of a frame, and whether it is ours to lead."""
        with self._lock:
            flight = self._flights.get(frame)
            if flight is not None:
                return flight, False
            flight = self._flights[frame] = _Flight()
            return flight, True

    def _land(self, frame: int, record: fmt.Buffer | None, error: DedupError | None) -> None:
        """End a flight. With neither record nor error its waiters try again."""
        with self._lock:
            flight = self._flights.pop(frame)
        flight.record, flight.error = record, error
        flight.done.set()

    def _lead(self, frame: int) -> None:
        """Fetch a frame and what comes with it, or wait for the process that does. Ends its
        flight."""
        try:
            record = self._here(frame) or self._claimed(frame, _OTHERS_SECONDS)
            if record is None:
                raise RemoteError("another process has been fetching it for too long")
        except DedupError as error:
            self._land(frame, None, error)
            return
        if not fmt.is_distant(record):
            self._land(frame, record, None)
            return
        try:
            wanted = self._wanted(frame, record)
        except DedupError as error:
            self._abandon(frame, error)
            return
        stream, group = self._gather(wanted)
        if stream.is_steady:
            self._demands.run(partial(self._go_on, frame + 1, stream))
        self._bring(group)

    def _here(self, frame: int) -> fmt.Buffer | None:
        """A frame's record if it has come and may not be stored yet."""
        held = self.keeper.find(frame)
        return None if held is None else memoryview(held)

    def _claimed(self, frame: int, seconds: float) -> fmt.Buffer | None:
        """Claim a frame and return its record; or, unclaimed, its record with the bytes, which
        somebody has stored meanwhile. None: another process had it claimed for so long. Raises
        ChunkDamagedError."""
        deadline = time.monotonic() + seconds
        while not self._claims.claim(frame):
            if time.monotonic() >= deadline:
                return None
            time.sleep(_LOOK_SECONDS)
        record = None
        try:
            with self._env.read() as txn:
                record = read_frame(txn, self._env, frame)
            if record is None:
                raise ChunkDamagedError(frame, "is missing from the store")
            fmt.verify_frame(record, frame)
        finally:
            if record is None or not fmt.is_distant(record):
                self._claims.release(frame)
        return record

    def _wanted(self, frame: int, record: fmt.Buffer) -> Wanted:
        """What there is to know about a frame that is elsewhere. Raises ChunkDamagedError."""
        slots = fmt.decode_frame_header(record, frame).slots
        found = self._find_places(frame)
        if found is None or not found.places:
            raise ChunkDamagedError(frame, "nothing says where its bytes are")
        return Wanted(frame, slots, found.places)

    def _find_places(self, frame: int) -> PlaceRecord | None:
        """Where else a frame is. Raises StoreDamagedError."""
        remote = self._env.open_remote()
        with self._env.read() as txn:
            return places.find_places(txn, remote, frame)

    # --- what comes together ---

    def is_next(self, frame: int) -> bool:
        """Whether a frame that nobody waits for lies where its pack is being read in order."""
        found = self._find_places(frame)
        if found is None or not found.places:
            return False
        return self._streams.is_next(found.places[0])

    def _window_max(self) -> int:
        """How many bytes a request may bring at most."""
        return min(int(self._bytes_per_second * _REQUEST_SECONDS), REQUEST_BYTES_MAX)

    def _gather(self, first: Wanted) -> tuple[Stream, list[Wanted]]:
        """What one request brings that begins with a frame: that, and those behind it in its pack
        that are elsewhere too and nobody is fetching, as far as they fit into the window; claimed,
        each with a flight. They are looked for by number, which goes as the image needs them."""
        place = first.places[0]
        stream = self._streams.begin(first.frame, place, self._window_max())
        end, limit = place.offset + place.length, place.offset + stream.window
        gap_max = stream.gap
        group = [first]
        passed = 0
        for frame in count(first.frame + 1):
            found = None
            with suppress(DedupError):  # of no concern to who reads `first`
                found = self._find_places(frame)
            here = found and next((p for p in found.places if p.pack == place.pack), None)
            if not here and gap_max and passed < PASSED_FRAMES_MAX:
                passed += 1  # metadata, mostly, which lies elsewhere
                continue
            if not here or not 0 <= here.offset - end <= gap_max:
                break
            if here.offset + here.length > limit:
                break
            record = self._take(frame)
            if record is not None:
                slots = fmt.decode_frame_header(record, frame).slots
                group.append(Wanted(frame, slots, (here,)))
                end = here.offset + here.length
            elif not gap_max:
                break
        self._streams.asked(stream, group[-1].frame, group[-1].places[0])
        return stream, group

    def reached(self, frame: int) -> None:
        """Note that a frame is about to be loaded: the first of what was fetched ahead has the next
        part fetched."""
        following = self._marks.pop(frame, None)
        if following is not None:
            self._demands.run(partial(self._go_on, *following))

    def _go_on(self, frame: int, stream: Stream) -> None:
        """Fetch as much of what comes next, from one pack or several, as a reader in order is
        brought at a time, and more when he gets there: the link is never idle."""
        mark, brought = 0, 0
        for following in range(frame, frame + _AHEAD_FRAMES_MAX):
            record = self._take(following)
            if record is None:
                continue
            try:
                wanted = self._wanted(following, record)
            except DedupError as error:
                self._abandon(following, error)
                return
            _, group = self._gather(wanted)
            self._demands.run(partial(self._bring, group))
            mark = mark or following
            brought += sum(one.places[0].length for one in group)
            if brought >= stream.window:
                self._marks[mark] = group[-1].frame + 1, stream
                return

    def _take(self, frame: int) -> fmt.Buffer | None:
        """Begin a flight of our own for a frame, and claim it, if it is elsewhere and nobody else
        is at it; its record."""
        _, ours = self._join(frame)
        if not ours:
            return None
        record = None
        try:
            if self._here(frame) is None:
                record = self._claimed(frame, 0)
        except DedupError:
            pass  # whoever reads it will be told
        if record is not None and fmt.is_distant(record):
            return record
        self._land(frame, record, None)
        return None

    def want(self, frames: Iterable[int]) -> None:
        """Begin to fetch those of the frames that are elsewhere, which somebody is about to read,
        in as few requests as they lie in. Waits for nothing, and raises nothing: who reads them is
        told."""
        ours = []
        with suppress(DedupError):
            for wanted in self._elsewhere(frames):
                if self._take(wanted.frame) is not None:
                    ours.append(wanted)
        for one in ours:
            self._streams.asked_for(one.frame, one.places[0])
        for group in runs(ours):
            self._demands.run(partial(self._bring, group))

    # --- what comes by another way (`ahead`) ---

    def share(self, remote: Remote) -> Remote:
        """The one of this remote that is in use, which has connections; this one, if none is."""
        known = self._remotes.get(remote.number)
        if known is None or known.objects.urls != remote.objects.urls:
            known = self._remotes[remote.number] = remote
        return known

    def run_early(self, task: Callable[[], None]) -> None:
        """Run something that fetches ahead, unless the fetcher is closed before its turn comes."""
        self._early.run(lambda: None if self._closing else task())

    def expect(self, frame: int) -> bool:
        """Begin a flight for a frame and claim it, if it is elsewhere and nobody else is at it;
        `deliver` ends the flight."""
        return self._take(frame) is not None

    def deliver(self, wanted: Wanted, sent: memoryview) -> None:
        """Keep the record of an expected frame, as it is in packs. If it is not what it should be,
        whoever waits for the frame fetches it."""
        try:
            record = received(sent, wanted.frame, wanted.slots, self._codecs)
        except RemoteDamagedError:
            self._abandon(wanted.frame, None)
            return
        with self._lock:
            self.counters.bytes += len(sent)
            self.counters.frames += 1
        self._keep(wanted.frame, record)

    # --- the request ---

    def _bring(self, group: list[Wanted]) -> None:
        """Fetch a group, whose frames are claimed and in flight and come in order in a pack of
        the first one's first place; or the first alone from another of its places. Every flight
        ends."""
        error: DedupError | None = None
        for at, place in enumerate(group[0].places):
            part = group if at == 0 else group[:1]
            try:
                records = self._request(place, part)
            except DedupError as failure:
                error = _copy(failure)  # without the traceback, which has this frame
                continue
            for wanted, record in zip(part, records, strict=True):
                if record is None:
                    self._abandon(wanted.frame, None)
                    continue
                self._keep(wanted.frame, record)
            for wanted in group[len(part) :]:
                self._abandon(wanted.frame, None)
            return
        self.counters.errors += 1
        for wanted in group:
            self._abandon(wanted.frame, error)

    def _keep(self, frame: int, record: bytearray) -> None:
        """End a flight with what came, which is stored behind the back of who waits."""
        self.keeper.keep(frame, record)
        self._land(frame, memoryview(record), None)

    def _abandon(self, frame: int, error: DedupError | None) -> None:
        self._claims.release(frame)
        self._land(frame, None, error)

    def _request(self, place: Place, group: list[Wanted]) -> list[bytearray | None]:
        """One range request; the group's records, verified and sealed under their numbers; None for
        a neighbour of the first that is damaged there. Raises RemoteError, RemoteDamagedError."""
        self._refuse_failing(place.remote)
        # The first may be asked for elsewhere than in its first place, and then comes alone.
        spans = [place, *(wanted.places[0] for wanted in group[1:])]
        length = spans[-1].offset + spans[-1].length - place.offset
        records: list[bytearray | None] = []

        def accept(data: bytes) -> None:
            records.clear()
            records.extend(self._verified(memoryview(data), spans, group))

        began = time.monotonic()
        try:
            self._remote(place.remote).read(place.pack, place.offset, length, accept)
        except (RemoteNotFoundError, RemoteDamagedError):
            raise  # of this pack: others may be whole
        except RemoteError as error:
            self._failed[place.remote] = (time.monotonic() + _FAILING_SECONDS, str(error))
            raise
        seconds = time.monotonic() - began
        counters = self.counters
        with self._lock:
            counters.requests += 1
            counters.bytes += length
            counters.frames += len(group)
            counters.seconds += seconds
            speed = length / max(seconds, 1e-3)
            self._bytes_per_second += (speed - self._bytes_per_second) / 4
        return records

    def _refuse_failing(self, remote: int) -> None:
        # A text: one exception that is raised to many would keep the frames of all of them.
        until, reason = self._failed.get(remote, (0.0, ""))
        if time.monotonic() < until:
            raise RemoteError(reason)

    def _remote(self, number: int) -> Remote:
        remote = self._remotes.get(number)
        if remote is None:
            remote = self._remotes[number] = find_number(self._env, number)
        return remote

    def _verified(
        self, data: memoryview, spans: list[Place], group: list[Wanted]
    ) -> list[bytearray | None]:
        """The group's records, out of what a remote has sent from the first span's offset on; None
        for a neighbour that is damaged. Raises RemoteDamagedError unless every chunk of the first
        has its digest."""
        records: list[bytearray | None] = []
        for span, wanted in zip(spans, group, strict=True):
            at = span.offset - spans[0].offset
            try:
                sent = data[at : at + span.length]
                records.append(received(sent, wanted.frame, wanted.slots, self._codecs))
            except RemoteDamagedError:
                if not records:
                    raise
                records.append(None)
        return records

    # --- many frames ---

    def fetch_all(
        self,
        frames: Iterable[int],
        on_progress: Callable[[int], None],
        pace: Pace = BULK,
        stop: threading.Event | None = None,
    ) -> None:
        """Fetch frames that are elsewhere, nearly in the order given, and store them. `on_progress`
        gets the bytes of chunks that each request brought. Ends early when `stop` is set. Raises
        RemoteError."""
        self.bring_all(frames, on_progress, pace, stop)
        self.keeper.flush()

    def bring_all(
        self,
        frames: Iterable[int],
        on_progress: Callable[[int], None],
        pace: Pace = BULK,
        stop: threading.Event | None = None,
    ) -> None:
        """As `fetch_all`, without waiting until the last of it is stored."""
        stopped = (stop or threading.Event()).is_set
        found = groups(self._elsewhere(frames), pace)
        if pace.urgent:
            self._fetch_at_once(found, on_progress, pace.requests, stopped)
        else:
            for group in found:
                while self._demands.busy and not stopped():
                    time.sleep(_LOOK_SECONDS)
                if stopped():
                    break
                on_progress(self._fetch_group(group))

    def _fetch_at_once(
        self,
        found: Iterator[list[Wanted]],
        on_progress: Callable[[int], None],
        requests: int,
        stopped: Callable[[], bool],
    ) -> None:
        under_way: deque[Future[int]] = deque()
        workers, ended = Workers(requests), threading.Event()

        def fetch(group: list[Wanted]) -> int:
            return 0 if ended.is_set() else self._fetch_group(group)

        try:
            for group in found:
                if stopped():
                    break
                under_way.append(workers.submit(partial(fetch, group)))
                if len(under_way) > 2 * requests:
                    on_progress(under_way.popleft().result())
            while under_way:
                on_progress(under_way.popleft().result())
        finally:
            ended.set()
            workers.close(_STOP_SECONDS)

    def _elsewhere(self, frames: Iterable[int]) -> Iterator[Wanted]:
        """Those of the frames that are elsewhere, and where."""
        for frame in frames:
            with self._env.read() as txn:
                head = read_head(txn, self._env, frame)
            if head is not None and fmt.is_distant(head[0]):
                yield self._wanted(frame, head[0])

    def _fetch_group(self, group: list[Wanted]) -> int:
        """Fetch a group; what others are fetching meanwhile is waited for. The bytes of its
        chunks."""
        ours = [wanted for wanted in group if self._take(wanted.frame) is not None]
        for run in runs(ours):
            self._bring(run)
        for wanted in group:
            with self._env.read() as txn:
                head = read_head(txn, self._env, wanted.frame)
            if head is not None and fmt.is_distant(head[0]) and self._here(wanted.frame) is None:
                self.fetch(wanted.frame)
        return sum(slot.length for wanted in group for slot in wanted.slots)


def _copy(error: DedupError) -> DedupError:
    """An exception of one's own for each who waited: its reader adds image and offset to it. What
    the remote has lost is an error of the read (EIO): to who reads, the image is there."""
    if isinstance(error, ChunkDamagedError):
        return ChunkDamagedError(error.frame, error.reason, error.slot)
    return RemoteError(str(error))
