"""Tests of the deterministic ids: the same everywhere, different for what differs, and never invalid."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagetrace.instrument import ids

KEY = bytes(range(16))
WORD = st.integers(-(2**63), 2**63 - 1)


@given(st.binary(min_size=1, max_size=64), st.text(st.characters(codec="utf-8")))
def test_a_handle_is_63_bits_and_depends_on_key_and_text_alone(key: bytes, text: str):
    assert 0 <= ids.handle(key, text) < 2**63
    assert ids.handle(key, text) == ids.handle(bytes(key), str(text))


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_texts_that_differ_have_handles_that_differ(one: str, other: str):
    assert (ids.handle(KEY, one) == ids.handle(KEY, other)) == (one == other)


def test_keys_that_differ_give_handles_that_differ():
    assert ids.handle(KEY, "request-1") != ids.handle(KEY[::-1], "request-1")


def test_bytes_that_are_no_utf_8_have_a_handle():
    assert ids.handle(KEY, b"\xff\xfe".decode("utf-8", "surrogateescape")) > 0


@given(WORD, WORD)
def test_trace_ids_have_16_bytes_span_ids_8_and_none_is_all_zeros(one: int, other: int):
    traces = [ids.step_trace_id(KEY, one, other), ids.request_trace_id(KEY, one)]
    spans = [
        ids.step_span_id(KEY, one, other),
        ids.segment_span_id(KEY, one, other),
        ids.request_span_id(KEY, one),
        ids.state_span_id(KEY, one, 12, other, 3),
    ]
    assert [len(found) for found in traces] == [16] * len(traces)
    assert [len(found) for found in spans] == [8] * len(spans)
    assert all(any(found) for found in traces + spans)


def test_purposes_do_not_share_ids():
    """A step and a segment with the same numbers are different spans."""
    found = [
        ids.step_trace_id(KEY, 7, 0)[:8],
        ids.request_trace_id(KEY, 7)[:8],
        ids.step_span_id(KEY, 7, 0),
        ids.segment_span_id(KEY, 7, 0),
        ids.request_span_id(KEY, 7),
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("changed", range(4))
def test_every_part_of_a_state_is_in_its_id(changed: int):
    words = [1, 12, 1_000, 5]
    other = [word + (place == changed) for place, word in enumerate(words)]
    assert ids.state_span_id(KEY, *words) != ids.state_span_id(KEY, *other)


class ZeroHash:
    """No input is known that hashes to zero; this hash makes every one do so."""

    def __init__(self, data: bytes, digest_size: int, **_: bytes):
        self.size = digest_size

    def digest(self) -> bytes:
        return bytes(self.size)


def test_an_id_of_zeros_is_replaced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ids, "blake2b", ZeroHash)
    assert ids.step_span_id(KEY, 1, 2) == bytes(7) + b"\x01"
    assert ids.request_trace_id(KEY, 1) == bytes(15) + b"\x01"


def test_another_process_computes_the_same_ids():
    code = (
        "from stagetrace.instrument import ids; key = bytes(range(16));"
        "print(ids.handle(key, 'ü'), ids.step_trace_id(key, 3, 4).hex(), ids.segment_span_id(key, 5, 6).hex())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    expected = f"{ids.handle(KEY, 'ü')} {ids.step_trace_id(KEY, 3, 4).hex()} {ids.segment_span_id(KEY, 5, 6).hex()}"
    assert found.strip() == expected


def test_instances_are_random_positive_words():
    found = {ids.new_instance() for _ in range(1_000)}
    assert len(found) == 1_000
    assert all(0 < instance < 2**63 for instance in found)


def test_any_string_has_a_handle() -> None:
    """A client may send a lone surrogate as its request id; the hook must not fail over it."""
    assert ids.handle(b"key", "\ud800") != ids.handle(b"key", "\udfff")
