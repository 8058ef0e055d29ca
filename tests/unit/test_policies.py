"""The replays' policies, held against sequences worked out by hand."""

import random

import pytest

from tools.benchmarks.policies import LRU, Min, Policy, S3Fifo, Sieve
from tools.benchmarks.traces import parse

ONE = dict.fromkeys(range(200), 1)


def hits(policy: Policy, uses: list[int]) -> str:
    return "".join("h" if policy.use(frame) else "." for frame in uses)


def test_lru_drops_what_has_not_been_used_for_longest() -> None:
    assert hits(LRU(2, ONE), [1, 2, 1, 3, 1, 2]) == "..h.h."


def test_sieve_forgives_a_visit_once_and_drops_the_oldest_that_had_none() -> None:
    # 4 drops 2 (1 was visited; the hand stops at 3), 5 drops 3, 6 drops 4: 1 is behind the hand.
    assert hits(Sieve(3, ONE), [1, 2, 3, 1, 4, 5, 6, 1, 2]) == "...h...h."


def test_sieves_hand_starts_again_at_the_oldest() -> None:
    # 3 finds both visited, comes round and drops 1; 4 goes on at 2, whose visit was forgiven.
    assert hits(Sieve(2, ONE), [1, 2, 1, 2, 3, 4, 3, 2]) == "..hh..h."


def test_s3fifo_keeps_what_was_used_more_than_once_from_a_scan() -> None:
    uses = [1, 1, 1, *range(100, 150), 1]
    assert hits(S3Fifo(10, ONE), uses)[-1] == "h"
    assert hits(LRU(10, ONE), uses)[-1] == "."


def test_s3fifo_does_not_keep_what_was_used_again_only_once() -> None:
    assert hits(S3Fifo(10, ONE), [1, 1, *range(100, 150), 1])[-1] == "."


def test_s3fifo_puts_what_its_ghosts_remember_into_the_main_queue() -> None:
    # Ten fill the cache; 10 drops 0 as a ghost. Back in main, 0 outlives the next scan.
    uses = [*range(11), 0, *range(100, 150), 0]
    assert hits(S3Fifo(10, ONE), uses)[-1] == "h"


def test_min_drops_what_is_used_again_last_and_passes_by_what_never_is() -> None:
    uses = [1, 2, 3, 1, 2, 4, 2, 1]
    assert hits(Min(2, ONE, uses), uses) == "...hh.hh"


@pytest.mark.parametrize("make", [LRU, Sieve, S3Fifo])
def test_no_policy_exceeds_its_budget_or_beats_min(make: type[Policy]) -> None:
    choose = random.Random(1)
    uses = [int(choose.paretovariate(0.6)) % 200 for _ in range(5000)]
    policy = make(40, ONE)
    for frame in uses:
        policy.use(frame)
        assert policy.bytes <= 40
    best = Min(40, ONE, uses)
    hits(best, uses)
    assert best.loads <= policy.loads == policy.loaded_bytes


@pytest.mark.parametrize("make", [LRU, Sieve, S3Fifo])
def test_a_frame_larger_than_the_budget_is_never_kept(make: type[Policy]) -> None:
    assert hits(make(4, {1: 2, 2: 5}), [1, 2, 2, 1]) == "...h"


def test_bytes_are_what_bounds_a_cache_of_unequal_frames() -> None:
    lru = LRU(10, {1: 4, 2: 4, 3: 8})
    assert hits(lru, [1, 2, 3, 1, 2, 1]) == ".....h"
    assert (lru.loads, lru.loaded_bytes) == (5, 24)


def test_a_log_becomes_requests_of_numbered_connections() -> None:
    log = (
        "2026-11-21 14:55:58.034444 Ready thread_model=3\n"
        "2026-11-21 14:55:58.8 connection=7 Connect export=base.1 tls=0 size=0x4000 write=0\n"
        "2026-11-21 14:55:58.9 connection=7 Read id=1 offset=0x1000 count=0x200 ...\n"
        "2026-11-21 14:55:58.9 connection=7 ...Read id=1 return=0\n"
    )
    trace = parse("list", log, {"base.1": "base"})
    assert trace.connections == [("base", "base.1")]
    assert trace.requests == [(0, 0x1000, 0x200)]
