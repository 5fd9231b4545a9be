"""Tests of the recorder and its ring file: what is written is what is read, and nothing of it can hurt the engine."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.decoded import Decoded
from unit.decoded import decoded as slots_decoded
from unit.rings import (
    DECODE,
    FORWARD,
    MARGIN,
    SLOTS,
    die,
    environment,
    opened,
    output_of,
    python,
    read_all,
    reader_of,
    ring_paths,
    sized,
    variables,
)

from stagetrace.exporters.assembly.long_records import Parts
from stagetrace.instrument import records
from stagetrace.instrument import ring as ring_module
from stagetrace.instrument.identity import claim_identity, read_identity
from stagetrace.instrument.ids import handle
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.records import Change, Event, RecordType, Text, header_word
from stagetrace.instrument.ring import ring_directory
from stagetrace.instrument.stages import STEP_COMPOSITION, Level

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stagetrace.exporters.drain import Batch, RingReader

COMPOSITION = tuple(range(100, 100 + len(STEP_COMPOSITION)))
WORD = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Recorder, RingReader]]:
    """A recorder and a reader; what the process is was read already."""
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        yield recorder, reader


def decoded(batch: Batch) -> Decoded:
    parts = Parts(), Parts()
    found = slots_decoded(batch.control, batch.detail, parts)
    assert not found.corrupt
    assert not len(parts[0])
    assert not len(parts[1])
    return found


def texts(batch: Batch) -> list[tuple[int, int, str]]:
    return decoded(batch).texts


# What is written is what is read


def test_a_segment(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    recorder.segment(FORWARD, 10, 20, 2**63 - 1, 7, 1, -2, -(2**63))
    (row,) = decoded(read_all(reader)).segments
    assert row == (1, FORWARD >> 32, threading.get_ident(), 10, 20, 2**63 - 1, 7, 1, -2, -(2**63), 0, 0, 0, 0, 0)


@pytest.mark.parametrize("count", range(9))
def test_a_segment_that_is_packed_in_parts(pair: tuple[Recorder, RingReader], count: int):
    recorder, reader = pair
    attributes = (1, -2, 3, 4, 5, 6, 7, -(2**63))[:count]
    for _ in range(2 * SLOTS):  # whatever was in the slot is gone
        recorder.put(records.HEAD.pack(FORWARD, 9), 1, 1, records.TAILS[8].pack(-1, -1, *(-1,) * 8))
    read_all(reader)
    recorder.put(records.HEAD.pack(FORWARD, 9), 10, 20, records.TAILS[count].pack(2**63 - 1, 7, *attributes))
    (row,) = decoded(read_all(reader)).segments
    assert row[1:] == (FORWARD >> 32, 9, 10, 20, 2**63 - 1, 7, *attributes, *(0,) * (8 - count))


def test_a_step(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    recorder.step_begin(10, 20, 5, 6, COMPOSITION)
    recorder.step_end(30, 5, 6)
    begin, end = decoded(read_all(reader)).steps
    thread = threading.get_ident()
    assert begin[1:] == (RecordType.STEP_BEGIN, (thread, 10, 20, 5, 6, *COMPOSITION))
    assert end[1:] == (RecordType.STEP_END, (thread, 30, 0, 5, 6, *(0,) * 8))


def test_a_state_and_an_event(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    finished = header_word(RecordType.EVENT, Event.FINISHED)
    assert recorder.state(DECODE, 10, 77, 5, 6, 1, 2, 3, 4)
    assert recorder.state(finished, 20, 77, 5, 6, 2, 9)
    state, event = decoded(read_all(reader)).controls
    thread = threading.get_ident()
    assert state[1:] == (RecordType.STATE, DECODE >> 32, (thread, 10, 77, 5, 6, 1, 2, 3, 4, 0, 0, 0, 0))
    assert event[1:] == (RecordType.EVENT, Event.FINISHED, (thread, 20, 77, 5, 6, 2, 9, 0, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("change", Change)
def test_a_change_of_membership(pair: tuple[Recorder, RingReader], change: Change):
    recorder, reader = pair
    assert recorder.member(header_word(RecordType.MEMBER, change), 77, 3, 40, 5, 6, 1, 16)
    (found,) = decoded(read_all(reader)).controls
    assert found[1:] == (RecordType.MEMBER, change, (77, 3, 40, 5, 6, 1, 16, *(0,) * 6))


@pytest.mark.parametrize("count", [0, 1, 9, 10, 21, 22, 800])
def test_a_snapshot(pair: tuple[Recorder, RingReader], count: int):
    recorder, reader = pair
    requests = [handle(recorder.key, str(number)) for number in range(count)]
    assert recorder.snapshot(5, 6, requests)
    ((_, type_, _, words),) = decoded(read_all(reader)).controls
    assert (type_, words[:3]) == (RecordType.SNAPSHOT, (5, 6, count))
    assert list(words[3 : 3 + count]) == requests


@given(st.text(max_size=300), st.integers(0, 2**63 - 1), st.sampled_from(Text))
@settings(max_examples=60, deadline=None)
def test_a_text(tmp_path_factory: pytest.TempPathFactory, text: str, number: int, kind: Text):
    with opened(tmp_path_factory.mktemp("text")) as (recorder, reader):
        read_all(reader)
        assert recorder.text(number, kind, text)
        assert texts(read_all(reader)) == [(number, kind, text.encode("utf-8", "replace").decode())]


@pytest.mark.parametrize("limit", [*range(12), 1024])
def test_a_text_is_cut_at_its_limit_in_bytes(pair: tuple[Recorder, RingReader], limit: int):
    recorder, reader = pair
    text = "aü€😀z"
    recorder.text(1, Text.REQUEST_ID, text, limit)
    assert texts(read_all(reader)) == [(1, 1, text.encode()[:limit].decode("utf-8", "replace"))]


def test_the_longest_text_fits(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    assert recorder.text(1, Text.PROCESS, "x" * (records.MAX_TEXT + 1))
    assert texts(read_all(reader)) == [(1, Text.PROCESS, "x" * records.MAX_TEXT)]


def test_a_snapshot_that_no_record_can_hold_is_dropped_and_counted(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    assert not recorder.snapshot(5, 6, range(10_000))
    batch = read_all(reader)
    assert (len(batch.control), batch.gap, reader.areas[0].losses.dropped) == (0, True, 1)


def test_a_word_that_does_not_fit_costs_its_own_slot_only(pair: tuple[Recorder, RingReader]):
    """The error is the hook's to contain; the ring stays in order."""
    recorder, reader = pair
    with pytest.raises(Exception, match=r"format requires|range"):
        recorder.segment(FORWARD, 10, 20, 1, 1, 2**63)
    recorder.segment(FORWARD, 30, 40, 1, 1)
    (row,) = decoded(read_all(reader)).segments
    assert row[3:5] == (30, 40)
    assert reader.areas[1].losses.torn + reader.areas[1].losses.unfinished == 1


def test_the_process_says_what_it_is(tmp_path: Path):
    with opened(tmp_path, role="worker", rank=3) as (recorder, reader):
        ((_, kind, text),) = texts(read_all(reader))
        assert (kind, text) == (Text.PROCESS, '{"role": "worker", "rank": 3}')
        assert (reader.role, reader.pid, reader.level) == ("worker", os.getpid(), Level.STEP)
        with environment(**variables(tmp_path)):
            assert recorder.open("engine_core", {"rank": 4})
        ((_, _, text),) = texts(read_all(reader))
        assert text == '{"role": "engine_core", "rank": 4}'
    assert len(ring_paths(tmp_path)) == 1


# Rings that are full


def test_a_full_control_ring_drops_the_newest_until_there_is_room(tmp_path: Path):
    with opened(tmp_path) as (recorder, reader):
        first = read_all(reader, commit=False)
        room = SLOTS - MARGIN - len(first.control)
        written = [number for number in range(2_000) if recorder.state(DECODE, number, 1)]
        assert written == [*range(room)]
        assert not recorder.text(1, Text.REQUEST_ID, "x")
        assert not recorder.member(header_word(RecordType.MEMBER, Change.JOIN), 1, 0, 0, 1, 1)
        batch = read_all(reader, commit=False)
        assert [words[1] for *_, words in decoded(batch).controls] == written
        assert batch.gap
        assert reader.areas[0].losses.dropped == 2_000 - room + 2
        assert not recorder.state(DECODE, 1, 1), "what was read but not committed is still the session's only copy"
        reader.committed()
        assert recorder.state(DECODE, 3_000, 1)
        batch = read_all(reader)
        assert [words[1] for *_, words in decoded(batch).controls] == [3_000]
        assert reader.areas[0].losses.dropped == 2_000 - room + 3
        assert reader.areas[0].losses.overwritten == 0


def test_what_was_dropped_lies_before_the_next_record(tmp_path: Path):
    """A snapshot with a number from `gap_end` on was written after the loss."""
    with opened(tmp_path) as (recorder, reader):
        while recorder.state(DECODE, 1, 1):
            pass
        read_all(reader)
        assert recorder.state(DECODE, 2, 1)
        batch = read_all(reader)
        assert batch.gap_end == int(batch.control["first"][0]) - 1


def test_a_long_record_is_dropped_whole(tmp_path: Path):
    with opened(tmp_path) as (recorder, reader):
        read_all(reader, commit=False)
        for number in range(SLOTS - MARGIN - 3):
            assert recorder.state(DECODE, number, 1)
        assert not recorder.snapshot(1, 1, range(40))
        assert recorder.state(DECODE, 0, 1)
        assert len(decoded(read_all(reader)).controls) == SLOTS - MARGIN - 2


def test_a_full_detail_ring_overwrites_the_oldest(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    for number in range(3 * SLOTS + 5):
        recorder.segment(FORWARD, number, number, 1, 1)
    found = [row[3] for row in decoded(read_all(reader)).segments]
    assert found == [*range(2 * SLOTS + 5, 3 * SLOTS + 5)]
    assert reader.areas[1].losses.overwritten == 2 * SLOTS + 5


# Opening, and not


def use(recorder: Recorder) -> None:
    """Every kind of write."""
    recorder.segment(FORWARD, 1, 2, 3, 4)
    recorder.put(records.HEAD.pack(FORWARD, 9), 1, 2, records.TAILS[1].pack(3, 4, 5))
    recorder.step_begin(1, 2, 3, 4, COMPOSITION)
    recorder.step_end(5, 3, 4)
    recorder.state(DECODE, 1, 1)
    recorder.member(header_word(RecordType.MEMBER, Change.LEAVE), 1, 0, 0, 3, 4)
    recorder.snapshot(3, 4, range(100))
    recorder.text(recorder.handle("x"), Text.REQUEST_ID, "x" * 1_000)
    recorder.errors[records.MAX_HOOKS - 1] = 1


def test_a_closed_recorder_is_off_and_safe_to_call():
    recorder = Recorder()
    for _ in range(3_000):
        use(recorder)
    assert recorder.level[0] == Level.OFF
    assert recorder.ring is None


def test_a_recorder_whose_ring_was_let_go_is_safe_to_call(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    use(recorder)
    die(recorder)
    use(recorder)
    assert recorder.level[0] == Level.OFF
    assert read_all(reader).ended
    assert len(ring_directory(reader.session).parts) > 1


def test_functions_that_a_hook_kept_write_where_the_recorder_does_now(tmp_path: Path):
    """A hook is installed before the process has a role, and outlives a fork."""
    recorder = Recorder()
    segment, put, state, step_end = recorder.segment, recorder.put, recorder.state, recorder.step_end

    def write(time_ns: int) -> None:
        segment(FORWARD, time_ns, time_ns, 1, 1)
        put(records.HEAD.pack(FORWARD, 9), time_ns, time_ns, records.TAILS[0].pack(1, 1))
        step_end(time_ns, 1, 1)
        state(DECODE, time_ns, 5)

    write(10)
    readers = []
    for number in (1, 2):  # the second as in a forked child that opens a ring of its own
        directory = tmp_path / str(number)
        with environment(**variables(directory)), sized():
            assert recorder.open("worker", {})
        readers.append(reader_of(ring_paths(directory)[0]))
        write(20 * number)
        die(recorder)
        write(30)
    for number, reader in enumerate(readers, 1):
        found = decoded(read_all(reader))
        assert [row[3] for row in found.segments] == [20 * number] * 2
        assert [words[1] for _, _, words in found.steps] == [20 * number]
        assert [words[1] for _, type_, _, words in found.controls if type_ == RecordType.STATE] == [20 * number]
        assert reader.ended


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_session_nothing_is_opened_or_made(tmp_path: Path, value: str | None):
    recorder = Recorder()
    with environment(STAGETRACE_SESSION=value, STAGETRACE_RING_DIR=str(tmp_path / "rings")):
        assert not recorder.open("worker", {})
    assert recorder.level[0] == Level.OFF
    assert not (tmp_path / "rings").exists()


@pytest.mark.parametrize(
    ("name", "level"),
    [("off", 0), ("request", 1), ("STEP", 2), ("layer", 3), ("kernel", 4), ("everything", 2), ("", 2)],
)
def test_a_process_starts_at_the_level_that_the_environment_names(tmp_path: Path, name: str, level: int):
    recorder = Recorder()
    with environment(STAGETRACE_LEVEL=name, **variables(tmp_path)), sized():
        assert recorder.open("worker", {})
    assert recorder.level[0] == level
    die(recorder)


def refused(directory: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What is logged where a recorder cannot be opened; it stays closed and safe."""
    recorder = Recorder()
    with environment(**variables(directory)), caplog.at_level(logging.WARNING, "stagetrace"):
        assert not recorder.open("worker", {})
    use(recorder)
    assert recorder.level[0] == Level.OFF
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    return caplog.messages[0]


def test_a_ring_directory_that_cannot_be_made_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "rings").touch()
    message = refused(tmp_path, caplog)
    assert "records nothing in this process (worker" in message
    assert str(tmp_path / "rings") in message


def test_a_session_that_cannot_be_made_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "session").touch()
    assert str(tmp_path / "session") in refused(tmp_path, caplog)


def test_a_ring_directory_open_to_all_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    directory = tmp_path / "rings" / claim_identity(tmp_path / "session").session
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    assert "STAGETRACE_RING_DIR" in refused(tmp_path, caplog)


AS_ANOTHER_USER = """
import os, sys
from stagetrace.instrument.recorder import RECORDER
os.environ["STAGETRACE_SESSION"] = sys.argv[1]
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
del os.environ["STAGETRACE_RING_DIR"]
print(RECORDER.open("worker", {}), RECORDER.level[0])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a directory that belongs to somebody else")
def test_a_default_directory_that_somebody_else_made_is_refused(tmp_path: Path):
    """In /dev/shm anybody can be first to make it, open to all, and then move what others put there."""
    user = 54_321
    claim_identity(tmp_path / "session")
    above = [path for path in tmp_path.parents if path.is_relative_to(tempfile.gettempdir())]
    for path in (*above[:-1], tmp_path, tmp_path / "session", tmp_path / "session" / "session.json"):
        path.chmod(path.stat().st_mode | 0o755)
    os.chown(tmp_path / "session", user, user)
    with environment(STAGETRACE_RING_DIR=None):
        default = ring_directory("x").parent.with_name(f"stagetrace-{user}")
    default.mkdir()
    try:
        default.chmod(0o777)
        process = python(AS_ANOTHER_USER, tmp_path, str(tmp_path / "session"), str(user))
        out, err = process.communicate(timeout=60)
        assert out == "False 0\n", err
        assert f"{default} belongs to another user" in err
        assert not list(default.iterdir()) or not list(default.glob("*/*.ring"))
    finally:
        shutil.rmtree(default)


def test_rings_and_their_directories_are_private(pair: tuple[Recorder, RingReader]):
    _, reader = pair
    assert reader.path.stat().st_mode & 0o777 == 0o600
    assert reader.path.parent.stat().st_mode & 0o777 == 0o700


OPEN = """
from stagetrace.instrument.recorder import RECORDER
opened = RECORDER.open("worker", {})
RECORDER.segment(1 | 1 << 16 | 51 << 32, 1, 2, 3, 4)
print(opened, RECORDER.ring and RECORDER.ring.control_slots, RECORDER.ring and RECORDER.ring.detail_slots)
"""
SMALL = records.HEADER_SIZE + 2 * SLOTS * records.SLOT_SIZE


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (SMALL + (1 << 23), "True 4096 16384"),
        (SMALL + (1 << 19), "True 1024 4096"),
        (SMALL, "True 1024 1024"),
        (SMALL // 4, "False None None"),
    ],
)
def test_where_files_are_limited_the_ring_is_smaller(tmp_path: Path, most: int, expected: str):
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))\n"
    process = python(limit + OPEN, tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, expected + "\n"), err
    assert ("no room for a ring" in err) == expected.startswith("False")
    assert not list((tmp_path / "rings").glob("*/*.partial"))


def test_a_file_size_limit_is_what_the_kernel_calls_it(tmp_path: Path):
    """That the limit above is met by this errno is the kernel's word, not ours."""
    code = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    os.posix_fallocate(os.open({str(tmp_path / "file")!r}, os.O_CREAT | os.O_RDWR), 0, 2000)
except OSError as error:
    print(error.errno)
"""
    assert output_of(python(code, tmp_path)) == f"{errno.EFBIG}\n"
    assert errno.EFBIG in ring_module._NO_ROOM


def in_small_tmpfs(directory: Path, size: str) -> subprocess.CompletedProcess[str]:
    """Runs OPEN where the rings' directory is a file system of that size, in a mount namespace of its own."""
    (directory / "rings").mkdir()
    script = f'mount -t tmpfs -o size={size},mode=0700 tmpfs "$1" && exec "$2" -c "$3"'
    return subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", str(directory / "rings"), sys.executable, OPEN],
        env={**os.environ, **variables(directory)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def namespaces() -> bool:
    """Whether this machine lets us mount in a namespace."""
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs tmpfs /tmp"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not namespaces(), reason="user or mount namespaces are not allowed here")
@pytest.mark.parametrize(
    ("size", "expected"), [("3m", "True 4096 16384"), ("1m", "True 1024 4096"), ("64k", "False None None")]
)
def test_in_a_small_file_system_the_ring_is_smaller(tmp_path: Path, size: str, expected: str):
    found = in_small_tmpfs(tmp_path, size)
    assert (found.returncode, found.stdout) == (0, expected + "\n"), found.stderr
    assert ("enlarge /dev/shm" in found.stderr) == expected.startswith("False")


# Threads, interruptions, memory


def test_threads_never_share_a_slot(tmp_path: Path):
    threads, each = 4, 4_000
    with opened(tmp_path, control=32 * 1024, detail=32 * 1024) as (recorder, reader):
        read_all(reader)
        start = threading.Barrier(threads)

        def write(number: int) -> None:
            start.wait()
            for i in range(each):
                recorder.segment(FORWARD, i, i, number, 1)
                recorder.state(DECODE, i, number)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            running = [threading.Thread(target=write, args=(number,)) for number in range(threads)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        batch = read_all(reader)
    found = decoded(batch)
    assert len(np.unique(batch.detail["first"])) == len(batch.detail) == threads * each
    assert len(np.unique(batch.control["first"])) == len(batch.control) == threads * each
    for number in range(threads):
        assert [row[3] for row in found.segments if row[5] == number] == [*range(each)]
        assert [words[1] for *_, words in found.controls if words[2] == number] == [*range(each)]


def test_drops_of_many_threads_are_counted_exactly(tmp_path: Path):
    threads, each = 4, 2_000
    with opened(tmp_path) as (recorder, reader):
        written: list[int] = []

        def write() -> None:
            written.append(sum(recorder.state(DECODE, 1, 1) for _ in range(each)))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            running = [threading.Thread(target=write) for _ in range(threads)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        batch = read_all(reader)
        assert reader.areas[0].losses.dropped == threads * each - sum(written)
        assert len(batch.control) == sum(written) + 1
        assert reader.areas[0].losses.overwritten == 0


def test_writes_from_a_garbage_collection_in_the_middle_of_a_write(tmp_path: Path):
    with opened(tmp_path, control=16 * 1024, detail=16 * 1024) as (recorder, reader):
        read_all(reader)
        inner = 0

        def in_collection(when: str, _: dict[str, int]) -> None:
            nonlocal inner
            recorder.segment(FORWARD, inner, inner, 99, 1)
            recorder.text(99, Text.REQUEST_ID, f"inner {when} {inner} " + "y" * 300)
            inner += 1

        threshold = gc.get_threshold()
        gc.callbacks.append(in_collection)
        gc.set_threshold(5, 2, 2)
        kept: list[list[int]] = []
        try:
            for i in range(300):
                kept.append([i])  # what makes the collector run
                recorder.step_begin(i, i, 1, i + 1, [*COMPOSITION])
                recorder.snapshot(1, i + 1, [request for request in range(30)])  # noqa: C416
                recorder.text(1, Text.REQUEST_ID, f"outer {i}")
        finally:
            gc.set_threshold(*threshold)
            gc.callbacks.remove(in_collection)
        found = decoded(read_all(reader))
    assert inner > 100
    assert [row[3] for row in found.segments] == [*range(inner)]
    assert [words[4] for _, _, words in found.steps] == [*range(1, 301)]
    snapshots = [words[:33] for _, type_, _, words in found.controls if type_ == RecordType.SNAPSHOT]
    assert snapshots == [(1, i + 1, 30, *range(30)) for i in range(300)]
    read = [text for *_, text in found.texts]
    assert [text for text in read if text.startswith("outer")] == [f"outer {i}" for i in range(300)]
    assert len([text for text in read if text.startswith("inner") and text.endswith("y" * 300)]) == inner


def test_writes_from_a_signal_handler_in_the_middle_of_a_write(tmp_path: Path):
    with opened(tmp_path, control=64 * 1024, detail=64 * 1024) as (recorder, reader):
        read_all(reader)
        numbers, inner = itertools.count(), 0

        def in_signal(*_: object) -> None:
            nonlocal inner
            number = next(numbers)  # on a busy machine the next signal comes while this one is handled
            recorder.text(99, Text.REQUEST_ID, f"inner {number} " + "y" * 100)
            recorder.step_begin(number, number, 99, 1, COMPOSITION)
            inner += 1

        before = signal.signal(signal.SIGALRM, in_signal)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        outer = 0
        try:
            until = time.monotonic() + 5
            while inner < 150 and time.monotonic() < until and outer < 6_000:
                recorder.text(1, Text.REQUEST_ID, f"outer {outer} " + "x" * 30)
                recorder.step_begin(outer, outer, 1, 1, COMPOSITION)
                outer += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        found = decoded(read_all(reader))
    assert inner > 10
    for instance, count in ((99, inner), (1, outer)):
        mine = [words for _, _, words in found.steps if words[3] == instance]
        assert sorted(words[1] for words in mine) == [*range(count)]
        assert {words[5:] for words in mine} == {COMPOSITION}
    read = [text for *_, text in found.texts]
    assert len(read) == inner + outer
    assert {len(text.split()[2]) for text in read} == {30, 100}


def test_drops_in_the_middle_of_a_drop_are_counted(tmp_path: Path):
    with opened(tmp_path) as (recorder, _):
        while recorder.state(DECODE, 1, 1):
            pass
        assert recorder.ring is not None
        memory, offset = recorder.ring.memory, records.CONTROL_DROPPED_OFFSET
        inner = 0

        def in_signal(*_: object) -> None:
            nonlocal inner
            recorder.state(DECODE, 1, 1)
            inner += 1

        before = signal.signal(signal.SIGALRM, in_signal)
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
        outer = 1
        try:
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                recorder.state(DECODE, 1, 1)
                outer += 1
                seen = inner
                dropped = int.from_bytes(memory[offset : offset + 8], "little")
                assert seen != inner or dropped == outer + inner
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert inner > 100


def test_memory_does_not_grow(pair: tuple[Recorder, RingReader]):
    recorder, _ = pair
    segment, state = recorder.segment, recorder.state

    def write(count: int) -> None:
        for i in range(count):
            segment(FORWARD, i, i, 1, 1)
        for i in range(count // 10):
            state(DECODE, i, 1)  # most of them are dropped

    write(2_000)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(900_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 4_096  # KiB
    tracemalloc.start()
    try:
        write(100)
        before = tracemalloc.get_traced_memory()[0]
        write(20_000)
        assert tracemalloc.get_traced_memory()[0] - before < 2_048
    finally:
        tracemalloc.stop()


# Forks and other processes

FORK = """
import os, sys, time
from stagetrace.instrument.recorder import RECORDER
FORWARD = 1 | 1 << 16 | 51 << 32
assert RECORDER.open("engine_core", {})
RECORDER.segment(FORWARD, 1, 1, 0, 0)
read, write = os.pipe()
child = os.fork()
if child == 0:
    level = RECORDER.level[0]
    RECORDER.segment(FORWARD, 2, 2, 0, 0)      # goes nowhere
    RECORDER.text(1, 1, "from the child")
    os.write(write, bytes([level]))
    if "open" in sys.argv:
        RECORDER.open("worker", {})
        RECORDER.segment(FORWARD, 3, 3, 0, 0)
    if "stay" in sys.argv:
        time.sleep(30)
    os._exit(0)
level = os.read(read, 1)[0]
if "stay" not in sys.argv:
    os.waitpid(child, 0)
RECORDER.segment(FORWARD, 4, 4, 0, 0)
print(level, child, flush=True)
sys.stdin.readline()
"""


def begins(batch: Batch) -> list[int]:
    return [row[3] for row in decoded(batch).segments]


def test_a_forked_child_does_not_write_into_its_parents_ring(tmp_path: Path):
    parent = python(FORK, tmp_path)
    assert parent.stdout is not None
    level, _ = parent.stdout.readline().split()
    (path,) = ring_paths(tmp_path)
    reader = reader_of(path)
    assert reader.alive(), "the lock went with the child"
    batch = read_all(reader)
    assert level == str(int(Level.OFF))
    assert begins(batch) == [1, 4]
    assert len(texts(batch)) == 1
    output_of(parent)
    assert read_all(reader).ended


def test_a_forked_child_that_opens_a_ring_records_there(tmp_path: Path):
    parent = python(FORK, tmp_path, "open")
    output_of(parent)
    readers = {reader.role: reader for reader in map(reader_of, ring_paths(tmp_path))}
    assert sorted(readers) == ["engine_core", "worker"]
    assert begins(read_all(readers["engine_core"])) == [1, 4]
    assert begins(read_all(readers["worker"])) == [3]
    assert readers["worker"].pid != readers["engine_core"].pid


def test_a_parent_is_seen_dead_while_its_child_lives(tmp_path: Path):
    parent = python(FORK, tmp_path, "stay")
    assert parent.stdout is not None
    _, child = parent.stdout.readline().split()
    (path,) = ring_paths(tmp_path)
    reader = reader_of(path)
    try:
        assert reader.alive()
        parent.kill()
        parent.wait(timeout=60)
        assert not reader.alive()
        os.kill(int(child), 0)  # it lives
    finally:
        os.kill(int(child), signal.SIGKILL)
        parent.communicate()


def test_a_process_that_is_started_does_not_keep_the_ring(tmp_path: Path):
    """An engine starts processes of its own, which must not hold its lock."""
    code = """
import subprocess, sys
from stagetrace.instrument.recorder import RECORDER
assert RECORDER.open("engine_core", {})
none = subprocess.DEVNULL
print(subprocess.Popen(["sleep", "30"], stdin=none, stdout=none, stderr=none, close_fds=False).pid)
"""
    started = int(output_of(python(code, tmp_path)))
    try:
        assert not reader_of(ring_paths(tmp_path)[0]).alive()
        os.kill(started, 0)
    finally:
        os.kill(started, signal.SIGKILL)


def test_processes_that_start_at_once_share_one_session(tmp_path: Path):
    processes = [python(OPEN, tmp_path) for _ in range(4)]
    for process in processes:
        assert output_of(process).startswith("True")
    identity = read_identity(tmp_path / "session")
    assert identity is not None
    readers = [reader_of(path) for path in ring_paths(tmp_path)]
    assert len(readers) == 4
    assert {reader.session for reader in readers} == {identity.session}
    assert {reader.pid for reader in readers} == {process.pid for process in processes}


def test_who_opens_a_ring_is_told_before_anything_is_recorded(tmp_path: Path):
    recorder = Recorder()
    seen: list[tuple[int, bool]] = []
    recorder.on_open(lambda: seen.append((recorder.level[0], recorder.ring is not None)))
    with environment(**variables(tmp_path)), sized():
        recorder.open("worker", {})
        recorder.open("worker", {})
    assert seen == [(Level.OFF, True)]
    assert recorder.level[0] == Level.STEP
    die(recorder)


RAYLET = """
import subprocess, sys, time
workers = [subprocess.Popen([sys.executable, *sys.argv[2:], str(rank)]) for rank in range(int(sys.argv[1]))]
print(*(worker.pid for worker in workers), flush=True)
time.sleep(60)
"""
RAY_WORKER = """
import ctypes, json, multiprocessing, os, pathlib, sys, time
directory, method, rank = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def record(begin):
    from stagetrace.instrument.recorder import RECORDER
    RECORDER.segment(1 | 1 << 16 | 51 << 32, begin, begin, rank, 1)

def in_child():
    record(99)  # goes nowhere: it has opened no ring

if __name__ == "__main__":
    assert "STAGETRACE_SESSION" not in os.environ
    while not (directory / "environment").exists():
        time.sleep(0.02)
    for name, value in json.loads((directory / "environment").read_text()).items():
        os.environ.setdefault(name, value)
    ctypes.CDLL(None).prctl(15, b"ray::RayWorker", 0, 0, 0)  # PR_SET_NAME, as setproctitle does
    multiprocessing.set_start_method(method)
    from stagetrace.adapters.vllm.plugin import register
    register()
    from stagetrace.instrument.recorder import RECORDER
    assert RECORDER.open("worker", {"rank": rank})
    record(1)
    child = multiprocessing.Process(target=in_child)
    child.start()
    child.join()
    assert child.exitcode == 0
    record(2)
    (directory / f"recorded-{rank}").touch()
    while not (directory / "go on").exists():
        time.sleep(0.02)
    record(3)
    (directory / f"went-on-{rank}").touch()
    time.sleep(60)
"""


def wait_for_files(directory: Path, *names: str) -> None:
    until = time.monotonic() + 60
    while not all((directory / name).exists() for name in names):
        assert time.monotonic() < until, f"{names} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_that_something_else_started(tmp_path: Path, method: str):
    """The way of Ray: a daemon that is not armed starts fresh interpreters, which are then told the driver's variables.

    They are nobody's children but the daemon's, change their names, and start processes in a way that they chose.
    """
    (tmp_path / "worker.py").write_text(RAY_WORKER, "utf-8")
    unarmed = {name: value for name, value in os.environ.items() if not name.startswith("STAGETRACE_")}
    command = [sys.executable, "-c", RAYLET, "2", str(tmp_path / "worker.py"), str(tmp_path), method]
    raylet = subprocess.Popen(command, env=unarmed, stdout=subprocess.PIPE, text=True)
    workers: list[int] = []
    try:
        assert raylet.stdout is not None
        workers += map(int, raylet.stdout.readline().split())
        with opened(tmp_path, role="engine_core") as (driver, reader):
            (tmp_path / "partial").write_text(json.dumps(variables(tmp_path)), "utf-8")
            (tmp_path / "partial").rename(tmp_path / "environment")
            wait_for_files(tmp_path, "recorded-0", "recorded-1")
            driver.segment(FORWARD, 7, 7, 9, 1)
            readers = [reader_of(path) for path in ring_paths(tmp_path) if path != reader.path]
            assert sorted(one.pid for one in readers) == sorted(workers), "a worker, and only it, has a ring"
            assert {one.session for one in readers} == {reader.session}
            raylet.kill()
            raylet.wait()
            (tmp_path / "go on").touch()
            wait_for_files(tmp_path, "went-on-0", "went-on-1")
            for one in readers:
                assert one.alive(), "it outlives who started it"
                os.kill(one.pid, signal.SIGKILL)
            until = time.monotonic() + 60
            while any(one.alive() for one in readers) and time.monotonic() < until:
                time.sleep(0.02)
            found = [read_all(one) for one in readers]
            own = [[row[3] for row in decoded(batch).segments if row[1] == FORWARD >> 32] for batch in found]
            assert own == [[1, 2, 3]] * 2  # beside pauses of the garbage collector
            assert all(batch.ended for batch in found)
            assert begins(read_all(reader)) == [7]
    finally:
        raylet.kill()
        raylet.communicate()
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
