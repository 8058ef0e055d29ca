"""Trace files hold what was written, and any bytes are a trace or refused."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from dedupstore.constants import CHUNK_BYTES_MAX
from dedupstore.errors import TraceError
from dedupstore.traces import Trace, decode_trace, encode_trace, make_trace

DIGESTS = st.binary(min_size=32, max_size=32)
TRACES = st.builds(
    make_trace, DIGESTS, st.lists(st.tuples(DIGESTS, st.integers(1, CHUNK_BYTES_MAX)), max_size=20)
)


@given(TRACES)
def test_every_trace_is_read_as_it_was_written(trace: Trace) -> None:
    assert decode_trace(encode_trace(trace)) == trace


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(TraceError):
        decode_trace(data)


@given(TRACES, st.integers(0, 2000), st.binary(max_size=4), st.integers(0, 4))
def test_a_changed_trace_is_a_trace_or_refused(
    trace: Trace, at: int, new: bytes, gone: int
) -> None:
    data = encode_trace(trace)
    try:
        changed = decode_trace(data[:at] + new + data[at + gone :])
    except TraceError:
        return
    assert len(set(changed.digests)) == len(changed.lengths)


@given(TRACES, st.data())
def test_a_trace_that_was_cut_off_anywhere_is_refused(trace: Trace, data: st.DataObject) -> None:
    file = encode_trace(trace)
    cut = data.draw(st.integers(0, len(file) - 1))
    with pytest.raises(TraceError):
        decode_trace(file[:cut])
