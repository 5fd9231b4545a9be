"""Tests of top: its numbers on small sessions, what it reads of long ones, its lines, and the command on real ones."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import struct
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner
from unit.commands import PATIENCE_S, STAGETRACE, Commands, commands_in, wait_for
from unit.sessions import INSTANCE, PROCESS, THREAD, SessionBuilder
from unit.terminal import Terminal

from stagetrace.analysis.breakdown import COLUMNS
from stagetrace.analysis.load import load
from stagetrace.analysis.top import Screen, State, View, as_dict, lines, look, plain_lines
from stagetrace.cli.main import app
from stagetrace.exporters.session import RAW_SCHEMA, TABLES, Commit, RingMark, Session, SessionError
from stagetrace.instrument.levels import LEVEL_FILE

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

S = 1_000_000_000
MS = 1_000_000
AGE_S = 100  # of the session at its last commit; monotonic 0 is when it began


class Live:
    """A session whose collector committed last when it was 100 s old, which is now."""

    def __init__(self, path: Path, **manifest: Any):
        self.began = time.time_ns() - AGE_S * S
        self.updated = self.began + AGE_S * S
        known = {"complete": False, "started_ns": self.began, "anchors": [(0, self.began)]}
        self.builder = SessionBuilder(path, **{**known, **manifest})

    def write(self) -> Session:
        session = self.builder.write()
        manifest = session.path / "manifest.json"
        data = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**data, "updated_ns": self.updated}))
        return session

    def view(self, window_s: float = 10, late_ns: int = S) -> View:
        """What is seen so long after the last commit."""
        return look(self.write(), window_s, self.updated + late_ns)


def serving(path: Path, **manifest: Any) -> Live:
    """Steps, requests and segments around the edges of a window of 10 s: (90 s, 100 s], of requests (86 s, 96 s]."""
    live = Live(path, **manifest)
    build = live.builder
    build.process(info={"engine": "vllm", "engine_version": "0.32.0", "model": "tiny"})
    build.process(key=7, role="front_end", info={"engine": "vllm", "engine_version": "0.32.0"})
    for handle, end, values in (
        (1, 86 * S, {"arrival_ns": 1, "first_output_ns": 2}),
        (2, 86 * S + 1, {"arrival_ns": 60 * S, "first_output_ns": 61 * S}),
        (3, 90 * S, {"arrival_ns": 80 * S, "first_output_ns": 83 * S, "output_tokens": 3, "first_token_ns": 82 * S}),
        (4, 95 * S, {"arrival_ns": 90 * S, "status": "aborted", "finish": "abort"}),
        (5, 96 * S, {"status": "lost", "finish": "unknown"}),
        (6, 96 * S + 1, {"arrival_ns": 95 * S, "first_output_ns": 96 * S}),
    ):
        build.request(handle, end, **{"prompt_tokens": 100, "last_token_ns": end - 2 * S, **values})
    held = {"running": 3, "waiting": 5, "kv_usage": 250_000, "preempted": 1, "output_tokens": 7}
    build.step(1, 89 * S, 90 * S, "prefill", **held, prefill_tokens=10_000)
    build.step(2, 90 * S, 91 * S, "prefill", **{**held, "waiting": 9}, prefill_tokens=500, cached_tokens=48)
    build.step(3, 91 * S, 92 * S, **{**held, "kv_usage": 750_000}, decode_tokens=4)
    build.step(4, 92 * S, 95 * S, **{**held, "output_tokens": None}, decode_tokens=2)
    last = {"running": 2, "waiting": 0, "kv_usage": 500_000, "preempted": 0, "output_tokens": 13}
    build.step(5, 95 * S, 100 * S, "mixed", **last, prefill_tokens=20, decode_tokens=2)
    for step, begin, end in ((1, 89, 90), (2, 90, 91), (3, 91, 92), (4, 92, 95), (5, 95, 100)):
        build.segment("schedule", begin * S, begin * S + 500 * MS, step)
        build.segment("execute", begin * S + 500 * MS, end * S, step)
        build.interval(step, end * MS, 2)
    build.segment("detokenize", 94 * S, 95 * S, None, process=7, thread=8)
    return live


# Numbers


def test_what_is_served(tmp_path: Path):
    shown = serving(tmp_path / "s").view()
    assert (shown.state, shown.message, shown.level) == (State.RECORDING, None, "step")
    assert shown.engines == ["vllm 0.32.0 tiny"]
    assert (shown.steps_ns, shown.requests_ns, shown.duration_ns, shown.alive) == (10 * S, 10 * S, AGE_S * S, 2)
    assert shown.batch is not None
    assert (shown.batch.running, shown.batch.waiting, shown.batch.kv_usage) == (2, 0, 0.5)
    assert (shown.batch.age_ns, shown.batch.idle) == (1 * S, False)
    assert (shown.waiting_peak, shown.kv_peak, shown.preempted) == (9, 0.75, 3)
    tokens = shown.tokens
    assert (tokens.of, tokens.prompt, tokens.cached, tokens.output, tokens.unknown) == ("steps", 52, 4.8, 2.7, 1)


def test_requests_of_the_window_that_is_settled(tmp_path: Path):
    shown = serving(tmp_path / "s").view()
    counts = shown.requests.by_status
    assert counts == {"finished": 2, "aborted": 1, "error": 0, "lost": 1, "open": 0}
    data = as_dict(shown)["requests"]
    assert data["finished_per_s"] == 0.2
    ttft, tpot, itl = (data["latencies"][name] for name in ("ttft", "tpot", "itl"))
    assert (ttft["count"], ttft["mean_ns"], ttft["p50_ns"], ttft["p99_ns"]) == (2, 2 * S, 2 * S, 2980 * MS)
    assert (tpot["count"], tpot["p50_ns"]) == (1, 3 * S)
    assert (itl["count"], itl["p50_ns"]) == (8, 93_500_000)  # steps 2 to 5, two tokens each: not those of step 1


def test_steps_by_kind_and_shares_of_the_window(tmp_path: Path):
    data = as_dict(serving(tmp_path / "s").view())
    kinds = {
        name: (kind["count"], kind["per_s"], kind["duration"]["p50_ns"])
        for name, kind in data["steps"]["by_phase"].items()
    }
    assert kinds == {"prefill": (1, 0.1, S), "decode": (2, 0.2, 2 * S), "mixed": (1, 0.1, 5 * S)}
    assert data["steps"]["by_phase"]["prefill"]["tokens_mean"] == 500
    scheduler, front_end = data["timelines"]
    shares = {row["stage"]: row["share"] for row in scheduler["stages"]}
    assert shares == {"schedule": 0.2, "execute": 0.8, "unattributed": 0}
    # Of the ten seconds of the steps: a request that ended in the window arrived long before it.
    assert front_end["accounted_ns"] == 10 * S
    assert {row["stage"]: row["share"] for row in front_end["stages"]} == {"detokenize": 0.1, "unattributed": 0.9}


def test_rates_of_a_young_session_are_over_its_life(tmp_path: Path):
    shown = serving(tmp_path / "s").view(window_s=200)
    assert (shown.steps_ns, shown.requests_ns) == (100 * S, 96 * S)
    assert shown.tokens.output == (7 * 3 + 13) / 100
    assert as_dict(shown)["requests"]["finished_per_s"] == 3 / 96


def test_ended_session_shows_the_last_that_was_recorded(tmp_path: Path):
    live = serving(tmp_path / "s", complete=True)
    live.updated += 3600 * S
    shown = live.view()
    assert (shown.state, shown.message) == (State.ENDED, None)
    # Nothing settles any more: the window of the requests is that of the steps.
    assert shown.requests.by_status["finished"] == 1 and shown.requests.by_status["aborted"] == 1
    assert shown.steps.count == 4 and shown.tokens.output == 2.7
    assert "2 running  0 waiting (at most 9)  at the last step" in plain_lines(shown, 80, "utf-8")


def test_idle_shows_the_last_step_and_its_age(tmp_path: Path):
    live = serving(tmp_path / "s")
    live.updated += 60 * S
    shown = live.view()
    assert shown.batch is not None
    assert (shown.batch.idle, shown.batch.running, shown.batch.age_ns) == (True, 2, 61 * S)
    assert (shown.waiting_peak, shown.kv_peak, shown.steps.count, shown.tokens.output) == (None, None, 0, 0)
    assert "2 running  0 waiting  idle since 61.0 s: that was at the last step" in plain_lines(shown, 80, "utf-8")


def test_a_step_longer_than_a_commit_shows_its_age(tmp_path: Path):
    live = serving(tmp_path / "s")
    live.updated += 5 * S
    assert "2 running  0 waiting (at most 0)  6.00 s ago" in plain_lines(live.view(), 80, "utf-8")


def test_schedulers_are_added_up_and_ended_ones_left_out(tmp_path: Path):
    live = serving(tmp_path / "s")
    build = live.builder
    build.process(key=8, role="engine_core", pid=2)
    build.process(key=9, role="engine_core", pid=3, ended=True)
    other = {"thread": THREAD, "output_tokens": 0, "running": 10, "waiting": 20, "kv_usage": 900_000}
    build.step(1, 98 * S, 99 * S, process=8, instance=INSTANCE + 1, **other)
    build.step(2, 97 * S, 98 * S, process=8, instance=INSTANCE + 1, **{**other, "running": 99})
    build.step(1, 98 * S, 99 * S, process=9, instance=INSTANCE + 2, **other)
    shown = live.view()
    assert shown.batch is not None
    assert (shown.batch.running, shown.batch.waiting, shown.batch.kv_usage) == (12, 20, 0.9)
    assert shown.alive == 3


def test_level_request_takes_tokens_from_requests(tmp_path: Path):
    live = Live(tmp_path / "s", level="request")
    live.builder.process()
    live.builder.request(1, 90 * S, prompt_tokens=300, cached_tokens=100, output_tokens=50)
    shown = live.view()
    tokens = shown.tokens
    assert (tokens.of, tokens.prompt, tokens.cached, tokens.output) == ("requests", 20, 10, 5)
    assert shown.batch is None
    text = plain_lines(shown, 80, "utf-8")
    assert "20.0 prompt  10.0 more cached  5.00 output  of requests that ended" in text
    assert "- running  - waiting  0.100/s finished" in text


def test_losses_and_errors_are_shown(tmp_path: Path):
    live = Live(tmp_path / "s", counts={"accounting_conflict": 2})
    live.builder.process(errors={"core:f": 3}, hooks=[{"name": "core:g", "status": "missing", "why": "gone"}])
    live.builder.losses(read=1000, overwritten=40, slots=64)
    live.builder.losses(ring="control", read=10, dropped=5, slots=64)
    shown = live.view()
    text = plain_lines(shown, 80, "utf-8")
    assert "losses     40 overwritten  5 dropped  2 accounting conflicts  of 1010 slots read\n" in text
    assert "errors     core:f 3  1 hooks are not installed" in text
    assert as_dict(shown)["losses"]["by_reason"]["overwritten"] == 40


# States


def test_a_session_without_a_collector_is_starting(tmp_path: Path):
    session = SessionBuilder(tmp_path / "s").session
    shown = look(session, 10, time.time_ns())
    assert (shown.state, shown.age_ns, shown.batch) == (State.STARTING, None, None)
    assert shown.message is not None and f"`stagetrace collect {session.path}`" in shown.message
    assert "starting" in plain_lines(shown, 80, "utf-8")


def test_a_collector_that_stopped_writing_is_stale(tmp_path: Path):
    live = serving(tmp_path / "s")
    assert live.view(late_ns=10 * S).state is State.RECORDING
    shown = live.view(late_ns=10 * S + 1)
    assert shown.state is State.STALE
    assert shown.message is not None
    assert (
        "not written for 10.0 s" in shown.message
        and f"`stagetrace collect {live.builder.session.path}`" in shown.message
    )
    assert shown.steps.count == 4  # the last that it saw


def test_messages_say_what_to_do(tmp_path: Path):
    live = Live(tmp_path / "none")
    assert "No process records" in (live.view().message or "")
    live = Live(tmp_path / "dead")
    live.builder.process(ended=True)
    assert "has ended" in (live.view().message or "")
    live = serving(tmp_path / "off")
    session = live.write()
    (session.path / LEVEL_FILE).write_text("off\n")  # as `stagetrace ctl` does
    shown = live.view()
    assert shown.level == "off" and f"`stagetrace ctl arm --session {session.path}`" in (shown.message or "")


# Rings


def commit(session: Session, number: int, wall_ns: int, **cursors: list[int]) -> None:
    """A commit of raw records at a time; its cursors by the role of the ring's process."""
    marks = {f"{role}-1-1.ring": RingMark(at, []) for role, at in cursors.items()}
    session.write_raw(RAW_SCHEMA.empty_table(), Commit(number, 0, wall_ns, rings=marks))


def fills(shown: View) -> dict[tuple[str, str], tuple[int | None, float, float | None]]:
    return {(ring.role, ring.ring): (ring.slots, ring.per_s, ring.holds_ns) for ring in shown.rings}


def with_rings(path: Path) -> Live:
    live = Live(path)
    live.builder.process()
    live.builder.process(key=7, role="worker", started_ns=94 * S)
    live.builder.process(key=8, role="old", ended=True)
    for key in (PROCESS, 7, 8):
        live.builder.losses(process=key, ring="control", slots=1000)
        live.builder.losses(process=key, ring="detail", slots=4000)
    return live


def test_what_rings_hold_at_the_rate_of_the_window(tmp_path: Path):
    live = with_rings(tmp_path / "s")
    session = live.builder.session
    commit(session, 1, live.began + 87 * S, engine_core=[50, 1000])
    commit(session, 2, live.began + 89 * S, engine_core=[100, 5000])
    commit(session, 3, live.began + 96 * S, engine_core=[120, 8000], worker=[0, 100])
    commit(session, 4, live.began + 99 * S, engine_core=[200, 15000], worker=[0, 500])
    shown = live.view()
    # Since the last commit before the window, 10 s; the worker's from its start, 5 s; the ended process has no ring.
    assert fills(shown) == {
        ("engine_core", "detail"): (4000, 1000, 4 * S),
        ("worker", "detail"): (4000, 100, 40 * S),
        ("engine_core", "control"): (1000, 10, 100 * S),
        ("worker", "control"): (1000, 0, None),
    }
    assert [ring.role for ring in shown.rings] == ["engine_core", "worker", "engine_core", "worker"]
    text = plain_lines(shown, 80, "utf-8")
    assert "rings      engine_core 1:  control holds 100 s  detail holds 4.00 s\n" in text
    assert "\n           worker 1:  control at rest  detail holds 40.0 s" in text


def test_rings_after_a_pause_and_at_rest(tmp_path: Path):
    live = with_rings(tmp_path / "s")
    session = live.builder.session
    commit(session, 1, live.began + 20 * S, engine_core=[100, 5000])
    assert set(fills(live.view()).values()) == {(1000, 0, None), (4000, 0, None)}
    # A commit comes every 2 s: what is in this one was written after 88 s.
    commit(session, 2, live.began + 92 * S, engine_core=[140, 9000])
    assert fills(live.view())["engine_core", "detail"] == (4000, 1000, 4 * S)


def test_rings_of_a_session_younger_than_the_window(tmp_path: Path):
    live = with_rings(tmp_path / "s")
    commit(live.builder.session, 1, live.began + 50 * S, engine_core=[100, 5000])
    assert fills(live.view(window_s=200))["engine_core", "detail"] == (4000, 100, 40 * S)


def test_a_ring_of_unknown_size_shows_its_rate(tmp_path: Path):
    live = Live(tmp_path / "s")
    live.builder.process()
    commit(live.builder.session, 1, live.began + 50 * S, engine_core=[100, 5000])
    shown = live.view(window_s=200)
    assert fills(shown)["engine_core", "detail"] == (None, 100, None)
    assert "control 2.00 slots/s  detail 100 slots/s" in plain_lines(shown, 80, "utf-8")


# What is read of a long session


def long_session(path: Path, parts: int = 20, **manifest: Any) -> Live:
    """A commit every 5 s, each with a step that ended 1 s before; those of the first half are damaged."""
    live = Live(path, **manifest)
    live.write()
    session = live.builder.session
    for number in range(1, parts + 1):
        end = (number * 5 - 1) * S
        live.builder.rows = {name: [] for name in TABLES}
        live.builder.request(number, end)
        live.builder.step(number, end - S, end, output_tokens=1)
        live.builder.segment("schedule", end - S, end, number)
        live.builder.interval(number, 5 * S, 1)
        for name in COLUMNS:
            session.write_table(name, pa.Table.from_pylist(live.builder.rows[name], schema=TABLES[name]), number)
            file = session.path / "tables" / name / f"part-{number:08}.parquet"
            if number <= parts // 2:
                file.write_bytes(b"damaged")
            at = live.began + number * 5 * S
            os.utime(file, ns=(at, at))
    return live


@pytest.mark.parametrize("complete", [False, True])
def test_a_window_reads_only_what_was_committed_since(tmp_path: Path, complete: bool):
    live = long_session(tmp_path / "s", complete=complete)
    session = live.builder.session
    with pytest.raises(SessionError, match="damaged"):
        load(session, None, COLUMNS)
    frames = load(session, 14, COLUMNS)
    until = 99 * S if complete else 100 * S
    assert (frames.since_ns, frames.until_ns) == (until - 14 * S, until)
    kept = [18, 19, 20]  # they ended at 89 s, 94 s and 99 s
    assert frames["steps"]["step"].tolist() == kept
    assert frames["segments"]["step"].tolist() == kept
    assert frames["intervals"]["step"].tolist() == kept
    assert frames["requests"]["handle"].tolist() == kept
    assert 0 < frames.rows["segments"] < 10
    assert look(session, 10, live.updated).steps.count == 2


def test_a_window_long_after_the_last_row_knows_that_there_are_rows(tmp_path: Path):
    live = long_session(tmp_path / "s")
    live.updated += 3600 * S
    manifest = live.builder.session.path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "updated_ns": live.updated}))
    frames = load(live.builder.session, 14, COLUMNS)
    assert len(frames["steps"]) == 0 and frames.rows["steps"] == 1
    batch = look(live.builder.session, 10, live.updated).batch
    assert batch is not None and batch.idle and batch.age_ns == 3601 * S


def test_a_copied_session_is_read_as_well(tmp_path: Path):
    live = long_session(tmp_path / "s")
    before = load(live.builder.session, 14, COLUMNS)["steps"]["step"].tolist()
    copied = Session.open(shutil.copytree(tmp_path / "s", tmp_path / "copy", copy_function=shutil.copyfile))
    for part in copied.path.glob("tables/*/*"):
        if part.read_bytes() == b"damaged":
            part.unlink()
    assert load(copied, 14, COLUMNS)["steps"]["step"].tolist() == before


def test_a_wall_clock_that_was_set_forward_hides_nothing(tmp_path: Path):
    live = long_session(tmp_path / "s")
    manifest = live.builder.session.path / "manifest.json"
    data = json.loads(manifest.read_text())
    data["anchors"] = [(0, live.began), (99 * S, live.began + 99 * S + 1800 * S)]
    data["updated_ns"] = live.updated + 1800 * S
    manifest.write_text(json.dumps(data))
    assert load(live.builder.session, 14, COLUMNS)["steps"]["step"].tolist() == [18, 19, 20]


def test_states_and_members_are_read_whole(tmp_path: Path):
    live = Live(tmp_path / "s")
    session = live.builder.session
    live.builder.request(1, 99 * S)
    live.builder.row("states", handle=1, stage=12, begin_ns=S, end_ns=2 * S)
    live.builder.row("members", handle=1, instance=INSTANCE, first_step=1, last_step=9)
    live.write()
    long_ago = live.began + 3 * S
    for name in ("states", "members"):
        (part,) = (session.path / "tables" / name).iterdir()
        os.utime(part, ns=(long_ago, long_ago))
        other = pa.Table.from_pylist(session.read_table(name).to_pylist(), schema=TABLES[name])
        session.write_table(name, other.set_column(0, "handle", pa.array([2])).cast(TABLES[name]), 2)
    frames = load(session, 14)
    assert frames["states"]["handle"].tolist() == frames["members"]["handle"].tolist() == [1]


# Lines


NASTY = "evil\x1b[2J\u202e\nname " + "\u6a21\u578b" * 60


def nasty(path: Path) -> View:
    live = serving(path)
    build = live.builder
    build.manifest.level = NASTY
    build.manifest.host = NASTY
    for number in range(30):
        info = {"engine": NASTY, "engine_version": NASTY, "model": NASTY + str(number)}
        build.process(key=100 + number, role=NASTY, pid=10**7 + number, errors={f"{NASTY}{number}": 10**9}, info=info)
    build.losses(**dict.fromkeys(("read", "overwritten", "dropped", "torn", "unfinished", "corrupt"), 10**15))
    for number in range(6):
        at = 90 * S + number * MS
        build.segment("forward", at, at + 10, 2, process=50 + number, thread=number)
        build.segment("rank_step", at, at + 10, 2, process=50 + number, thread=number)
    build.step(9, 99 * S, 100 * S, running=10**9, waiting=10**9, instance=5, process=5, prefill_tokens=10**15)
    return live.view()


@pytest.mark.parametrize("width", [80, 100, 240])
@pytest.mark.parametrize("make", [nasty, lambda path: serving(path).view(), lambda path: Live(path).view()])
def test_no_line_is_longer_than_the_screen(tmp_path: Path, width: int, make: Any):
    shown = make(tmp_path / "s")
    drawn = plain_lines(shown, width, "utf-8").split("\n")
    assert max(cell_len(line) for line in drawn) <= width
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", "".join(drawn))
    assert len(drawn) == len(lines(shown, width))


def test_what_is_too_long_for_a_line_goes_on_in_the_next(tmp_path: Path):
    live = Live(tmp_path / "s")
    live.builder.process(errors={f"core:hook_{number}": number for number in range(1, 30)})
    text = plain_lines(live.view(), 80, "utf-8")
    assert sorted(map(int, re.findall(r"core:hook_\d+ (\d+)(?=  |\n)", text))) == [*range(1, 30)]


def test_narrow_terminals_get_80_columns(tmp_path: Path):
    shown = serving(tmp_path / "s").view()
    assert plain_lines(shown, 20, "utf-8") == plain_lines(shown, 80, "utf-8")


def test_everything_of_a_usual_session_fits_80_by_24(tmp_path: Path):
    assert len(lines(serving(tmp_path / "s").view(), 80)) < 24


@pytest.mark.parametrize(("make", "more"), [(nasty, True), (lambda path: serving(path).view(), False)])
def test_a_screen_is_filled_and_what_does_not_fit_is_counted(tmp_path: Path, make: Any, more: bool):
    shown = make(tmp_path / "s")
    console = Console(width=80, height=24, force_terminal=True, color_system=None)
    drawn = console.render_lines(Screen(shown), console.options.update(width=80, height=24))
    text = ["".join(segment.text for segment in line).rstrip() for line in drawn]
    assert len(text) == 24 and text[-1] == "q ends"
    hidden = re.findall(r"\((\d+) more lines: enlarge the terminal\)", "\n".join(text))
    assert bool(hidden) is more
    if more:
        assert int(hidden[0]) == len(lines(shown, 80)) - 22


def test_ascii_output_has_no_micro_sign(tmp_path: Path):
    live = serving(tmp_path / "s")
    live.builder.interval(5, 20_000, 1000)
    shown = live.view()
    assert "µs" in plain_lines(shown, 80, "utf-8")
    assert "us" in plain_lines(shown, 80, "ascii") and plain_lines(shown, 80, "ascii").isascii()


def test_every_key_of_the_json_is_documented(tmp_path: Path):
    live = with_rings(tmp_path / "s")
    live.builder.rows = serving(tmp_path / "other").builder.rows
    live.builder.process(key=9, hooks=[{"name": "core:g", "status": "missing", "why": "gone"}])
    page = (Path(__file__).parents[2] / "docs" / "numbers.md").read_text("utf-8")
    words = set(re.findall(r"`(\w+)`", page))
    named = {"finished", "aborted", "error", "lost", "open"}  # by name: statuses, phases, reasons
    assert keys_of(json.loads(json.dumps(as_dict(live.view())))) - words - named == set()


def keys_of(data: Any) -> set[str]:
    if isinstance(data, dict):
        inner = [keys_of(value) for key, value in data.items() if key not in ("by_reason", "by_status")]
        by_name = {"prefill", "decode", "mixed"}
        return set().union(set(data) - by_name, *inner)
    return set().union(*map(keys_of, data)) if isinstance(data, list) else set()


# The command


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


def once(commands: Commands, *arguments: str | Path) -> dict[str, Any]:
    process = commands.start(STAGETRACE, "top", *arguments, "--once", "--json")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err.decode()
    found: dict[str, Any] = json.loads(out)
    return found


def refused(*arguments: str | Path) -> str:
    """What the command says on its standard error when it refuses; a pipe is its output."""
    done = CliRunner().invoke(app, ["top", *map(str, arguments)])
    assert (done.exit_code, done.stdout) == (2, "")
    return " ".join(done.stderr.split())


@contextmanager
def recorded(commands: Commands, session: Path) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """A process that serves requests, and its collector."""
    until = commands.directory / "until"
    collector = commands.collect(session)
    wait_for((session / "manifest.json").exists)
    writer = commands.recording("--steady", "--pause", "0.02", "--until", until, session=session)
    try:
        yield writer, collector
    finally:
        until.touch()
        assert writer.wait(PATIENCE_S) == 0
        if collector.poll() is None:
            wait_for(lambda: not commands.ring_files())
            collector.terminate()
            assert collector.wait(PATIENCE_S) == 0


def finished(session: Path) -> int:
    return look(Session.open(session), 60, time.time_ns()).requests.by_status["finished"]


def test_once_on_a_running_session_goes_with_it(commands: Commands, tmp_path: Path):
    path = tmp_path / "stagetrace-sessions" / "session"  # the newest, and so the one that is meant
    path.parent.mkdir()
    with recorded(commands, path):
        wait_for(lambda: finished(path))
        before = once(commands, "--window", "60s")
        assert before["session"]["state"] == "recording" and before["session"]["processes_alive"] == 1
        wait_for(lambda: finished(path) > before["requests"]["by_status"]["finished"])
        after = once(commands, "--window", "60s")
        assert after["requests"]["by_status"]["finished"] > before["requests"]["by_status"]["finished"]
        assert after["losses"]["slots_read"] > before["losses"]["slots_read"]
        assert after["steps"]["by_phase"]["decode"]["count"] > before["steps"]["by_phase"]["decode"]["count"]
        assert not after["batch"]["idle"] and after["tokens"]["output_per_s"] > 0
        assert {ring["ring"] for ring in after["rings"]} == {"control", "detail"}
        for ring in after["rings"]:
            assert ring["per_s"] > 0
            assert ring["holds_ns"] == pytest.approx(ring["slots"] * 1e9 / ring["per_s"])
        assert sum(after["losses"]["by_reason"].values()) == 0 and after["contained_errors"] == {}
    ended = once(commands)
    assert (ended["session"]["state"], ended["rings"]) == ("ended", [])
    assert ended["requests"]["by_status"]["finished"] > 0


def test_a_collector_that_was_killed_shows_as_stale(commands: Commands, tmp_path: Path):
    session = tmp_path / "session"
    with recorded(commands, session) as (_, collector):
        wait_for(lambda: look(Session.open(session), 10, time.time_ns()).steps.count)
        collector.kill()
        collector.wait(PATIENCE_S)
        manifest = session / "manifest.json"
        data = json.loads(manifest.read_text())  # rather than to wait for it to get old
        manifest.write_text(json.dumps({**data, "updated_ns": data["updated_ns"] - 11 * S}))
        shown = once(commands, session)
        assert shown["session"]["state"] == "stale" and shown["session"]["age_ns"] > 10 * S
        assert f"stagetrace collect {session}" in shown["message"]
    again = commands.collect(session)
    wait_for(lambda: not commands.ring_files())
    again.terminate()
    assert again.wait(PATIENCE_S) == 0
    assert once(commands, session)["session"]["state"] == "ended"


def test_once_prints_plain_lines(commands: Commands, tmp_path: Path):
    session = serving(tmp_path / "s").write()
    commands.environment["COLUMNS"] = "90"
    process = commands.start(STAGETRACE, "top", session.path, "--once", "--window", "20s")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (0, b"")
    text = out.decode()
    assert text.startswith("stagetrace top  recording 100 s  window 20.0 s  level step  vllm 0.32.0 tiny\n")
    assert "\x1b" not in text and max(map(cell_len, text.split("\n"))) <= 90


def test_what_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    session = serving(tmp_path / "s").write()
    assert "add --once" in refused(session.path)
    assert "--json goes with --once" in refused(session.path, "--json")
    assert "stagetrace run" in refused("--once")  # there is no session
    assert "not a stagetrace session" in refused(tmp_path, "--once")
    assert "not a length of time" in refused(session.path, "--once", "--window=soon")
    assert "not a length of time" in refused(session.path, "--once", "--interval=0")
    (session.path / "tables" / "steps" / "part-00000002.parquet").write_bytes(b"damaged")
    assert "tables/steps" in refused(session.path, "--once")


@pytest.mark.parametrize(("ending", "status"), [(b"q", 0), (b"\x03", 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_live_view_ends_and_leaves_the_terminal_as_it_was(
    commands: Commands, tmp_path: Path, ending: bytes | signal.Signals, status: int
):
    live = serving(tmp_path / "s")
    session = live.write()
    terminal = Terminal(commands, session.path, "--interval", "60s")
    wait_for(lambda: terminal.shows("q ends"))
    assert "2 running  0 waiting (at most 9)" in terminal.output
    if isinstance(ending, bytes):
        os.write(terminal.ours, ending)
    else:
        terminal.process.send_signal(ending)
    assert terminal.ended() == status


def test_live_view_follows_the_session_and_its_mishaps(commands: Commands, tmp_path: Path):
    live = serving(tmp_path / "s")
    session = live.write()
    terminal = Terminal(commands, session.path, "--interval", "0.1s")
    wait_for(lambda: terminal.shows("2 running"))
    part = session.path / "tables" / "steps" / "part-00000002.parquet"
    whole = part.read_bytes()
    part.write_bytes(b"damaged")
    wait_for(lambda: terminal.shows("tables/steps is damaged"))
    part.write_bytes(whole)
    terminal.output = terminal.output[:20]
    wait_for(lambda: terminal.shows("2 running"))
    fcntl.ioctl(terminal.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 100, 0, 0))
    wait_for(lambda: terminal.shows("more lines: enlarge"))
    os.write(terminal.ours, b"q")
    assert terminal.ended() == 0
