"""Tests of event pairs and of the device's clock on a device that a test moves: no span twice, no wait, true bounds."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from unit.devices import NEVER, FakeDevice, FakeEvent, LiveDevice

from stagetrace.instrument.device_clock import DRIFT_PPM, DeviceClock
from stagetrace.instrument.device_pairs import DRAFT, FORWARD, MOST_PAIRS, MOST_STREAMS, SAMPLE, STAGES, DevicePairs
from stagetrace.instrument.records import HEAD, TAILS
from stagetrace.instrument.stages import BY_ID

US, MS, SECOND = 1_000, 1_000_000, 1_000_000_000


@dataclass(frozen=True)
class Written:
    """A record of a device's span."""

    stage: str
    thread: int
    begin: int
    end: int
    instance: int
    step: int
    rank: int
    delay: int
    error: int


@dataclass
class Ring:
    """What `put` was given."""

    spans: list[Written] = field(default_factory=list)

    def put(self, head: bytes, begin: int, end: int, tail: bytes) -> None:
        header, thread = HEAD.unpack(head)
        self.spans.append(Written(BY_ID[header >> 32].name, thread, begin, end, *TAILS[3].unpack(tail)))


@dataclass
class Rank:
    """A rank that launches steps on a device."""

    device: FakeDevice = field(default_factory=FakeDevice)
    most: int = MOST_PAIRS
    ring: Ring = field(default_factory=Ring)
    truth: dict[tuple[int, str], list[tuple[int, int]]] = field(default_factory=dict)  # step, stage: begin, end

    def __post_init__(self) -> None:
        self.pairs = DevicePairs(self.device, self.ring.put, self.device.clock, self.most)

    @property
    def spans(self) -> list[Written]:
        return self.ring.spans

    def span(self, stage: int, step: int, width: int, host: int = 50 * US) -> None:
        self.begin(stage)
        self.device.now += host
        self.device.launch(width)
        self.end(stage, step)

    def begin(self, stage: int) -> None:
        self.pairs.begin(stage)

    def end(self, stage: int, step: int) -> None:
        pair = self.pairs._open[stage]
        self.pairs.end(stage, 5, step, 3)
        if pair is not None:
            assert isinstance(pair.first, FakeEvent) and isinstance(pair.last, FakeEvent)
            assert pair.first.reached is not None and pair.last.reached is not None
            self.truth.setdefault((step, STAGES[stage]), []).append((pair.first.reached, pair.last.reached))

    def step(self, step: int, forward: int = 4 * MS, sample: int = MS) -> None:
        self.pairs.step_begins()
        self.span(FORWARD, step, forward)
        self.span(SAMPLE, step, sample)

    def wait(self) -> None:
        """The engine waits for what it has launched."""
        self.device.now = max(self.device.now, *self.device.free.values()) + 20 * US


def test_a_step_is_written_when_the_engine_has_waited_for_it():
    rank = Rank()
    rank.step(1)
    rank.pairs.poll()
    assert rank.spans == [], "it still runs"
    rank.wait()
    rank.pairs.poll()
    rank.pairs.poll()
    forward, sample = rank.spans
    assert (forward.stage, sample.stage) == ("device_forward", "device_sample")
    assert (forward.instance, forward.step, forward.rank, forward.thread) == (5, 1, 3, 1)
    for span in rank.spans:
        ((begin, end),) = rank.truth[1, span.stage]
        assert abs(span.begin - begin) <= span.error and abs(span.end - end) <= span.error
    assert forward.error < 30 * US, "the engine saw it 20 us after it was done"
    assert forward.end <= sample.begin
    assert 0 < forward.delay < 40 * US, "the device was idle"
    assert sample.delay > 3 * MS, "it waited behind the forward pass"


def test_dozens_of_steps_in_flight():
    rank = Rank()
    for step in range(1, 51):
        rank.step(step, 10 * MS)
    assert rank.spans == []
    rank.device.now += 52 * MS  # and 5 for launching
    rank.pairs.poll()
    assert [span.step for span in rank.spans if span.stage == "device_forward"] == [1, 2, 3, 4, 5]
    rank.wait()
    rank.pairs.poll()
    assert [(span.step, span.stage) for span in rank.spans] == [
        (step, stage) for step in range(1, 51) for stage in ("device_forward", "device_sample")
    ]
    assert rank.pairs.skipped == 0 and rank.device.made <= 2 * MOST_PAIRS


def test_where_the_pool_is_empty_pairs_are_left_out_and_counted():
    rank = Rank(most=5)
    for step in range(1, 6):
        rank.step(step)
    assert rank.pairs.skipped == 6, "the reference has one, two steps have two each"
    rank.wait()
    rank.step(6)
    rank.wait()
    rank.pairs.poll()
    assert [span.step for span in rank.spans] == [1, 1, 2, 2, 6, 6]
    assert rank.device.made == 10


def test_a_device_that_never_finishes_costs_a_pool_and_a_question_a_poll():
    rank = Rank(most=20)
    rank.device.free[7] = NEVER
    for step in range(1, 200):
        rank.step(step)
    asked = rank.device.asked
    rank.pairs.poll()
    assert rank.device.asked == asked + 1 and rank.spans == [] and rank.device.made == 40
    assert rank.pairs.skipped == 2 * 199 - 19


def test_nothing_while_a_stream_is_captured():
    rank = Rank()
    rank.step(1)
    rank.wait()
    rank.pairs.poll()
    rank.device.capturing_now = True
    rank.pairs.begin(FORWARD)
    rank.pairs.end(FORWARD, 5, 2, 3)
    rank.device.capturing_now = False
    rank.pairs.begin(SAMPLE)  # which captures, and fails
    rank.device.capturing_now = True
    rank.pairs.end(SAMPLE, 5, 2, 3)
    rank.device.capturing_now = False
    rank.wait()
    rank.pairs.poll()
    assert len(rank.spans) == 2


def test_what_a_switch_cuts_is_not_written_and_its_events_are_used_again():
    rank = Rank()
    rank.step(1)
    rank.pairs.begin(DRAFT)
    rank.pairs.forget()
    rank.wait()
    asked = rank.device.asked
    rank.pairs.forget()
    rank.pairs.poll()
    assert rank.spans == [] and rank.device.asked == asked
    made = rank.device.made
    rank.step(2)
    rank.wait()
    rank.pairs.poll()
    assert [span.step for span in rank.spans] == [2, 2] and rank.device.made == made
    for span in rank.spans:
        assert abs(span.begin - rank.truth[2, span.stage][0][0]) <= span.error


def test_a_switch_while_another_thread_polls_is_left_to_that_one():
    rank = Rank()
    rank.step(1)
    rank.wait()
    query = type(rank.pairs._pending[0].first).query
    switched = []

    def forgets(event: object) -> bool:
        if not switched:
            switched.append(True)
            rank.pairs.forget()  # cannot have the turn: poll() below has it
        return query(event)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unit.devices.FakeEvent.query", forgets)
        rank.pairs.poll()
    assert switched and rank.spans == []
    rank.step(2)
    rank.wait()
    rank.pairs.poll()
    assert [span.step for span in rank.spans] == [2, 2]


def test_what_a_broken_step_left_open_is_given_up():
    rank = Rank()
    rank.pairs.step_begins()
    for stage in (SAMPLE, DRAFT):
        rank.pairs.begin(stage)  # the engine raises
    rank.step(2)
    rank.wait()
    rank.pairs.poll()
    assert [span.step for span in rank.spans] == [2, 2]


def test_an_error_of_the_device_gives_the_turn_back():
    rank = Rank()
    rank.step(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unit.devices.FakeEvent.query", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rank.pairs.poll()
    rank.wait()
    rank.pairs.poll()
    assert len(rank.spans) == 2


def test_a_draft_is_inside_sampling_whatever_the_clocks():
    rank = Rank()
    rank.pairs.step_begins()
    rank.span(FORWARD, 1, MS)
    rank.pairs.begin(SAMPLE)
    rank.span(DRAFT, 1, MS)
    rank.pairs.end(SAMPLE, 5, 1, 3)
    rank.wait()
    rank.pairs.poll()
    forward, draft, sample = rank.spans
    assert forward.end <= sample.begin <= draft.begin <= draft.end <= sample.end


def test_a_draft_in_sampling_that_was_broken_off_is_before_what_comes_then():
    rank = Rank()
    rank.pairs.step_begins()
    rank.begin(SAMPLE)
    rank.span(DRAFT, 1, MS)
    rank.step(2)
    rank.wait()
    rank.pairs.poll()
    draft, forward, _ = rank.spans
    assert draft.stage == "device_draft" and forward.stage == "device_forward"
    assert draft.begin < draft.end <= forward.begin


def test_sampling_is_around_a_draft_that_was_placed_when_less_was_known():
    rank = Rank()
    rank.pairs.step_begins()
    rank.begin(SAMPLE)
    rank.span(DRAFT, 1, 10 * US)
    rank.device.now += 10 * MS  # the offset may be anything up to so much: the draft is placed in the middle
    rank.pairs.poll()
    rank.end(SAMPLE, 1)
    rank.device.now += 10 * US
    rank.pairs.poll()
    draft, sample = rank.spans
    assert draft.error > 4 * MS and draft.end > rank.truth[1, "device_draft"][0][1] + 4 * MS
    assert sample.begin <= draft.begin <= draft.end <= sample.end
    assert abs(sample.end - rank.truth[1, "device_sample"][0][1]) <= sample.error


def test_a_span_is_around_those_in_it_even_when_the_clocks_contradict_themselves():
    rank = Rank()
    rank.pairs.step_begins()
    rank.pairs.begin(SAMPLE)
    rank.pairs.begin(DRAFT)
    outer, inner = rank.pairs._open[SAMPLE], rank.pairs._open[DRAFT]
    assert outer is not None and inner is not None and inner.around == outer.number
    assert rank.pairs._placed(inner, 100, 300) == (100, 300, 0)
    assert rank.pairs._placed(outer, 200, 250) == (100, 300, 100), "its error is larger by what it was moved"


def test_streams_have_timelines_of_their_own_but_no_more_than_a_few():
    rank = Rank()
    rank.pairs.step_begins()
    for stream in range(MOST_STREAMS + 2):
        rank.device.current = stream
        rank.span(FORWARD, stream + 1, MS)
    rank.wait()
    rank.pairs.poll()
    assert [span.thread for span in rank.spans] == [*range(1, MOST_STREAMS + 1)]
    assert rank.pairs.skipped == 2


def test_threads_that_poll_at_once_and_a_switch_in_between():
    """One launches, two fetch, and now and then the level is switched: nothing is written twice, nothing is lost."""
    steps, most = 4000, 60
    device = LiveDevice()  # the other would need a lock
    rank = Rank(device, most)
    stop = threading.Event()
    failed: list[BaseException] = []

    def fetch() -> None:
        try:
            while not stop.is_set():
                rank.pairs.poll()
        except BaseException as error:
            failed.append(error)

    fetchers = [threading.Thread(target=fetch) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for fetcher in fetchers:
            fetcher.start()
        for step in range(1, steps + 1):
            rank.step(step, 10 * US, 2 * US)
            if step % 97 == 0:
                rank.pairs.forget()
        device.wait()
    finally:
        stop.set()
        for fetcher in fetchers:
            fetcher.join()
        sys.setswitchinterval(interval)
    rank.pairs.poll()
    assert not failed
    keys = [(span.step, span.stage) for span in rank.spans]
    assert len({*keys}) == len(keys) > 0
    thrown_away = 2 * steps - len(keys) - rank.pairs.skipped
    assert 0 <= thrown_away <= most * (1 + steps // 97), "what was under way at a switch"
    assert rank.device.made == 2 * rank.pairs._made <= 2 * most and len(rank.pairs._turn) == 1
    assert len(rank.pairs._free) + (rank.pairs._reference is not None) == rank.pairs._made
    for span in rank.spans:
        begin, end = rank.truth[span.step, span.stage][0]
        assert abs(span.begin - begin) <= span.error and abs(span.end - end) <= span.error


# The clock


def test_a_clock_that_drifts_too_fast_is_noticed():
    rank = Rank(FakeDevice(drift_ppm=5000))
    for step in range(1, 30):
        rank.step(step)
        rank.wait()
        rank.pairs.poll()
        rank.device.now += SECOND
    assert rank.pairs.contradictions > 0
    rank = Rank(FakeDevice(drift_ppm=DRIFT_PPM // 2))
    for step in range(1, 30):
        rank.step(step)
        rank.wait()
        rank.pairs.poll()
        rank.device.now += SECOND
    assert rank.pairs.contradictions == 0


def test_a_device_that_is_never_idle_has_a_clock_as_good():
    """The host is a step ahead all the time: that an event was launched says little of when it was reached."""
    rank, ends = Rank(FakeDevice(drift_ppm=30)), [0]
    for step in range(1, 300):
        rank.step(step, 18 * MS, MS)
        ends.append(rank.device.free[7])
        rank.device.now = max(rank.device.now, ends[-2]) + 30 * US
        rank.pairs.poll()
    assert rank.device.now > 5 * SECOND and len(rank.spans) > 580
    assert all(span.error < 60 * US for span in rank.spans[10:]) and rank.pairs.contradictions == 0
    for span in rank.spans:
        begin, end = rank.truth[span.step, span.stage][0]
        assert abs(span.begin - begin) <= span.error and abs(span.end - end) <= span.error


@given(
    st.integers(-DRIFT_PPM + 1, DRIFT_PPM - 1),
    st.lists(st.tuples(st.integers(0, 2 * SECOND), st.integers(0, 5 * MS), st.integers(0, 5 * MS)), min_size=1),
)
def test_the_true_time_is_within_the_bound(drift: int, moments: list[tuple[int, int, int]]):
    device, clock, host = FakeDevice(drift_ppm=drift), DeviceClock(), SECOND
    best = None
    for later, before, after in moments:
        host += later
        own = device.timer(host)
        clock.observe(own, host - before, host + after)
        assert clock.contradictions == 0
        error = clock.error_ns(own)
        assert abs(clock.host_ns(own) - host) <= error
        assert error <= (before + after) // 2 + 1001, "no wider than the newest observation alone"
        ahead = host + 3 * SECOND
        assert abs(clock.host_ns(device.timer(ahead)) - ahead) <= clock.error_ns(device.timer(ahead))
        best = error if best is None else min(best, error)


# All of it together


class Pairs(RuleBasedStateMachine):
    """A rank that launches steps while its device works, is held up, drifts, and its level is switched."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = Rank(most=40)
        self.number = 0
        self.checked = 0
        self.forgotten: set[int] = set()

    @initialize(drift=st.integers(-DRIFT_PPM + 5, DRIFT_PPM - 5), most=st.integers(1, 40))
    def a_device(self, drift: int, most: int) -> None:
        self.rank = Rank(FakeDevice(drift_ppm=drift), most=most)

    @rule(
        forward=st.integers(0, 30 * MS),
        sample=st.integers(0, 5 * MS),
        draft=st.sampled_from(["none", "inside", "after", "two"]),
        host=st.integers(US, 20 * MS),
    )
    def step(self, forward: int, sample: int, draft: str, host: int) -> None:
        self.number += 1
        step, rank = self.number, self.rank
        rank.pairs.step_begins()
        rank.span(FORWARD, step, forward, host)
        if draft == "inside":
            rank.begin(SAMPLE)
            rank.span(DRAFT, step, sample // 2)
            rank.device.launch(sample)
            rank.end(SAMPLE, step)
        else:
            rank.span(SAMPLE, step, sample)
        for _ in range({"after": 1, "two": 2}.get(draft, 0)):
            rank.span(DRAFT, step, sample)

    @rule(later=st.integers(0, 40 * MS))
    def time_goes_by(self, later: int) -> None:
        self.rank.device.now += later
        self.rank.pairs.poll()

    @rule(later=st.integers(SECOND, 200 * SECOND))
    def nothing_to_do(self, later: int) -> None:
        self.rank.device.now += later

    @rule()
    def waited(self) -> None:
        if self.rank.device.free:
            self.rank.wait()
        self.rank.pairs.poll()

    @rule()
    def switched(self) -> None:
        self.rank.pairs.forget()
        self.forgotten |= {*range(1, self.number + 1)} - {span.step for span in self.rank.spans}

    @rule(stage=st.sampled_from([FORWARD, SAMPLE, DRAFT]))
    def broken_off(self, stage: int) -> None:
        self.rank.pairs.step_begins()
        self.rank.pairs.begin(stage)

    @rule(stage=st.sampled_from([FORWARD, SAMPLE, DRAFT]))
    def captured(self, stage: int) -> None:
        self.rank.device.capturing_now = True
        self.rank.pairs.begin(stage)
        self.rank.pairs.end(stage, 5, -1, 3)
        self.rank.device.capturing_now = False

    @invariant()
    def pool_is_bounded(self) -> None:
        assert self.rank.device.made <= 80

    @invariant()
    def spans_are_true_and_in_order(self) -> None:
        spans, self.checked = self.rank.spans[self.checked :], len(self.rank.spans)
        for span in spans:
            assert span.step > 0 and span.step not in self.forgotten
            assert span.begin <= span.end and span.end <= self.rank.device.now + span.error
            begin, end = self.rank.truth[span.step, span.stage].pop(0)  # a second one would have none
            assert abs(span.begin - begin) <= span.error and abs(span.end - end) <= span.error
        assert self.rank.pairs.contradictions == 0

    def teardown(self) -> None:
        spans = self.rank.spans
        line: list[Written] = []
        for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
            while line and line[-1].end <= span.begin:
                line.pop()
            assert not line or span.end <= line[-1].end, "they follow or nest"
            line.append(span)


TestPairs = Pairs.TestCase
TestPairs.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
