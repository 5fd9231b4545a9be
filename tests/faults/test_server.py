"""Faults of a real server and of what collects from it, under load; docs/endings.md has a row for each.

A server takes a minute to start, so one bears several faults, one after the other, and two are started at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from engines.raising import RAISES
from engines.recording import STAGETRACE, ask
from engines.server import Server, environment, serve
from faults.accounts import Book, books
from faults.load import QUESTIONS, TIMEOUT_S, WIDTH, load_on, long_request, texts
from faults.mounts import mounted
from unit.rings import environment as settings
from unit.rings import reader_of

from stagetrace.analysis.load import Frames, load
from stagetrace.exporters.drain import DETAIL
from stagetrace.exporters.session import Manifest, Session
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT
from stagetrace.instrument.ring import chosen_slots
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quickstart.load import Result

PATIENCE_S = 60.0
SMALL_RINGS = {"STAGETRACE_RING_SECONDS": "2"}  # so that a stopped collector loses records within seconds
STOPPED_S = 5.0  # at least, and until a ring has overflowed
OVERFLOW_S = 120.0
MINUTE_S = 60.0
ROLES = ("front_end", "engine_core", "worker")
WAYS = ("worker killed", "told to end")
VLLM_KILLS = "force killing remaining process"  # v1/utils.py, shutdown()


@dataclass
class Run:
    """A server that is recorded under `stagetrace run`, and what a test did to it."""

    path: Path
    server: Server
    rings: Path
    engine: list[psutil.Process]  # the server's own processes, at the time when it was ready
    collector: psutil.Process
    answers: list[str] = field(default_factory=list)

    @property
    def session(self) -> Session:
        return Session.open(self.path)

    @property
    def manifest(self) -> Manifest:
        return self.session.read_manifest()

    def frames(self) -> Frames:
        return load(self.session)

    def wait_for_commit(self) -> None:
        """Waits until the collector has written something that it drained after now."""
        for _ in range(2):
            before = self.manifest.updated_ns
            wait_for(lambda before=before: self.manifest.updated_ns > before, "a commit")


def wait_for(condition, what: str, patience_s: float = PATIENCE_S) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience_s:.0f} s for {what}")
        time.sleep(0.05)


@contextmanager
def running(model: Path, directory: Path, **env: str) -> Iterator[Run]:
    """A server under `stagetrace run`, with its session and its rings in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    path, rings = directory / "session", directory / "rings"
    wrapper = (*STAGETRACE, "run", "--session", str(path), "--no-report", "--")
    settings = {"STAGETRACE_RING_DIR": str(rings), **env}
    with serve(model, "--enforce-eager", env=settings, wrapper=wrapper, may_leave_behind=True) as server:
        processes = server.processes()
        (collector,) = [one for one in processes if "--beside" in one.cmdline()]
        engine = [one for one in processes if one.pid not in (collector.pid, server.process.pid)]
        yield Run(path, server, rings, engine, collector)


@contextmanager
def collecting(run: Run) -> Iterator[subprocess.Popen[bytes]]:
    """`stagetrace collect` on the session of a run."""
    with open(run.path.parent / "collect.log", "ab") as log:
        process = subprocess.Popen(
            [*STAGETRACE, "collect", str(run.path)],
            env=environment({"STAGETRACE_RING_DIR": str(run.rings)}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all of these have ended; a zombie has."""
    return not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def ring_files(run: Run) -> list[Path]:
    return [path for path in run.rings.rglob("*") if path.is_file()]


def heads(run: Run) -> dict[Path, int]:
    """How many slots were written into each detail ring so far."""
    found = {}
    for path in ring_files(run):
        reader = reader_of(path)
        found[path] = reader.areas[DETAIL].find_head()
        reader.close()
    return found


def laps(run: Run, before: dict[Path, int]) -> float:
    """How many times over the ring that was written fastest has been filled since then."""
    slots = chosen_detail_slots()
    return max((head - before[path]) / slots for path, head in heads(run).items())


def chosen_detail_slots() -> int:
    with settings(**SMALL_RINGS):
        return chosen_slots(Level.STEP)[1]


def by_id(run: Run) -> dict[str, dict[str, object]]:
    """The rows of the requests by the id that the client saw; each once."""
    rows = run.frames()["requests"].dropna(subset=["external_id"])
    assert rows["external_id"].is_unique, "a request is in the session twice"
    return {row["external_id"]: row for row in rows.to_dict("records")}


# One server: its collector stopped, `run` killed, the collector killed, another collector, then all killed at once


@dataclass
class Starved:
    """What happened to the first server."""

    run: Run
    healthy: list[Result]
    stopped: list[Result]
    without_run: list[Result]
    without_collector: list[Result]
    collected_again: list[Result]
    cut_id: str  # of a request that was under way when the server was killed
    cut_off: list[Result]
    lost_while_stopped: int
    rings_left: int  # when the server and its collector had been killed


def starve(model: Path, directory: Path, stopped_s: float) -> Starved:
    with running(model, directory, **SMALL_RINGS) as run:
        run.answers = texts(ask(run.server, *QUESTIONS))
        with load_on(run.server) as load:
            load.wait_for(12)
            run.wait_for_commit()
            healthy = [*load.results]
            lost = sum(one.lost for one in run.manifest.losses)
            run.collector.suspend()
            mark = time.monotonic()
            written = heads(run)
            time.sleep(stopped_s)
            wait_for(lambda: laps(run, written) > 1.5, "a ring to overflow", OVERFLOW_S)
            run.collector.resume()
            stopped = load.ended_since(mark)
            run.wait_for_commit()
            lost = sum(one.lost for one in run.manifest.losses) - lost
            mark = time.monotonic()
            os.kill(run.server.process.pid, signal.SIGKILL)  # `stagetrace run`
            load.wait_for(8)
            run.wait_for_commit()
            without_run = load.ended_since(mark)
            mark = time.monotonic()
            run.collector.kill()
            load.wait_for(8)
            without_collector = load.ended_since(mark)
            with collecting(run) as collector:
                run.wait_for_commit()
                mark = time.monotonic()
                load.wait_for(12)
                run.wait_for_commit()
                again = [result for result in load.ended_since(mark) if result.started_s > mark]
                mark = time.monotonic()
                with long_request(run.server) as long:
                    cut_id = f"{long.id}-0"
                    for process in run.engine:
                        process.kill()
                    collector.kill()
                    load.wait_for(WIDTH)
                    wait_for(lambda: gone(run.engine), "the end of the server")
            left = ring_files(run)
            with collecting(run) as collector:
                wait_for(lambda: not ring_files(run), "the last drain")
                collector.terminate()
                assert collector.wait(PATIENCE_S) == 0
            cut_off = [result for result in load.ended_since(mark) if result.started_s < mark]
    return Starved(run, healthy, stopped, without_run, without_collector, again, cut_id, cut_off, lost, len(left))


# Another server: its hooks raise on every call


@dataclass
class Raising:
    """What happened to the server whose hooks raise."""

    run: Run
    results: list[Result]
    log: str
    status: int


def raise_in_hooks(model: Path, directory: Path) -> Raising:
    site = directory / "site"
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(RAISES)
    with running(model, directory, PYTHONPATH=str(site)) as run:
        results = ask(run.server, *QUESTIONS)
        with load_on(run.server) as load:
            load.wait_for(8)
        run.server.process.send_signal(signal.SIGTERM)
        status = run.server.process.wait(PATIENCE_S)
        results += load.results
        if ring_files(run):  # of a worker that outlived the server by more than `run` waits for
            with collecting(run) as collector:
                wait_for(lambda: not ring_files(run), "the last drain")
                collector.terminate()
                assert collector.wait(PATIENCE_S) == 0
    return Raising(run, results, run.server.log.read_text("utf-8", "replace"), status)


# Two more: one whose worker is killed, one that is told to end


@dataclass
class Ended:
    """A server that ended under load, in one way or another."""

    run: Run
    before: list[Result]  # ended before the deed, and were committed
    after: list[Result]  # ended after it
    cut_off: list[Result]  # of these: were under way then
    cut_id: str  # of one that was under way for certain
    cut_last: dict[str, Any]  # what its client got last
    engine_killed: bool  # by vLLM's own word, instead of waiting for its end
    status: int  # of `stagetrace run`


def end_under_load(model: Path, directory: Path, worker_alone: bool) -> Ended:
    with running(model, directory) as run:
        with load_on(run.server) as load:
            load.wait_for(12)
            run.wait_for_commit()
            before = [*load.results]
            pids = {process.role: process.pid for process in run.manifest.processes}
            core = [one for one in run.engine if one.pid == pids["engine_core"]]
            with long_request(run.server) as long:
                if worker_alone:
                    os.kill(pids["worker"], signal.SIGKILL)
                else:
                    run.server.process.send_signal(signal.SIGTERM)
                mark = time.monotonic()
                wait_for(lambda: gone(core), "the end of the engine")
            # vLLM may leave a stream open that it has killed the engine of, and waits for its client then.
            status = run.server.process.wait(TIMEOUT_S + PATIENCE_S)
        after = load.ended_since(mark)
        cut_off = [result for result in after if result.started_s < mark]
        killed = VLLM_KILLS in run.server.log.read_text("utf-8", "replace")
    return Ended(run, before, after, cut_off, f"{long.id}-0", long.last, killed, status)


@pytest.fixture(scope="module")
def ended(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Both of them, at once."""
    directory = tmp_path_factory.mktemp("ended")
    with ThreadPoolExecutor() as pool:
        found = {way: pool.submit(end_under_load, model, directory / way, way == "worker killed") for way in WAYS}
        return {way: one.result() for way, one in found.items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_ends_under_load_is_in_its_session(ended: dict[str, Ended], way: str) -> None:
    one = ended[way]
    manifest = one.run.manifest
    assert manifest.complete
    assert {process.role: process.ended for process in manifest.processes} == dict.fromkeys(ROLES, True)
    held = books(one.run.session)
    assert sum(book.overwritten + book.dropped for book in held.values()) == 0
    assert sum(book.other for book in held.values()) <= 1  # a record that the worker died in
    rows = by_id(one.run)
    for result in one.before:
        assert rows[result.id]["status"] == "finished"
        assert rows[result.id]["output_tokens"] == result.output_tokens
    # Each whose id its client knew; without one its first token never came. vLLM 0.32 kills an engine core right after
    # it told it to end, so a request is aborted if the core or the front end came to say so, and lost with them if not.
    told = {"aborted", "lost"} if one.engine_killed else {"aborted"}
    ended_as = {"worker killed": {"lost"}, "told to end": told}[way]
    assert rows[one.cut_id]["status"] in ended_as
    for result in one.cut_off:
        if result.id:
            row = rows[result.id]
            # One whose answer broke off may have had its last token by then.
            whole = (row["status"], row["finish"]) == ("finished", "length")
            assert whole or (result.error is not None and row["status"] in ended_as), result
    assert not set(one.run.frames()["requests"]["status"]) & {"open"}
    steps = one.run.frames()["steps"]
    assert steps["step"].is_unique
    assert (steps["step"].sort_values().diff().dropna() == 1).all()
    assert (steps["status"] != "complete").sum() <= 2  # what was in the engine then
    assert manifest.counts["accounting_conflict"] == 0
    assert gone([*one.run.engine, one.run.collector])
    assert ring_files(one.run) == []


def test_clients_see_the_death_of_a_worker(ended: dict[str, Ended]) -> None:
    one = ended["worker killed"]
    assert "error" in one.cut_last, one.cut_last
    assert any(result.error is not None for result in one.after)
    assert one.status == 0  # as vLLM ends by itself when its engine is dead


# What takes longer


@pytest.mark.matrix
def test_a_collector_that_stands_still_for_a_minute(model: Path, tmp_path: Path) -> None:
    starved = starve(model, tmp_path, MINUTE_S)
    test_the_server_does_not_notice_what_becomes_of_its_collector(starved)
    test_what_is_overwritten_while_the_collector_stands_still_is_counted_exactly(starved)
    test_requests_that_a_collector_saw_are_whole_and_there_once(starved)
    test_steps_are_in_the_session_once(starved)
    test_nothing_is_left_of_a_session_that_died(starved)


@pytest.mark.matrix
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_server_without_room_for_rings_serves_and_says_so(model: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "rings", "64k"), running(model, tmp_path) as run:
        results = ask(run.server, *QUESTIONS)
        run.server.process.send_signal(signal.SIGTERM)
        run.server.process.wait(PATIENCE_S)
        assert ring_files(run) == []
    texts(results)
    log = run.server.log.read_text("utf-8", "replace")
    assert log.count("stagetrace records nothing in this process") == len(ROLES)
    assert "enlarge /dev/shm" in log
    assert run.manifest.complete
    assert run.manifest.processes == []
    assert all(len(table) == 0 for table in run.frames().tables.values())


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Starved, Raising]]:
    """Both of them, at once."""
    directory = tmp_path_factory.mktemp("servers")
    with ThreadPoolExecutor() as pool:
        starved = pool.submit(starve, model, directory / "starved", STOPPED_S)
        raising = pool.submit(raise_in_hooks, model, directory / "raising")
        yield starved.result(), raising.result()


@pytest.fixture
def starved(two: tuple[Starved, Raising]) -> Starved:
    return two[0]


@pytest.fixture
def raising(two: tuple[Starved, Raising]) -> Raising:
    return two[1]


def test_the_server_does_not_notice_what_becomes_of_its_collector(starved: Starved) -> None:
    for phase in (starved.healthy, starved.stopped, starved.without_run, starved.without_collector):
        assert len(phase) >= 8
        assert [result.error for result in phase] == [None] * len(phase)


def test_what_is_overwritten_while_the_collector_stands_still_is_counted_exactly(starved: Starved) -> None:
    """Over all that follows as well: two collectors killed or stopped, and the death of the engine."""
    held = books(starved.run.session)
    assert {role for role, _ in held} == {*ROLES}
    assert starved.lost_while_stopped > 0
    assert sum(book.overwritten for book in held.values()) >= starved.lost_while_stopped - sum(
        book.dropped + book.other for book in held.values()
    )
    assert {ring: overwritten_of(held, ring) for ring in ("control",)} == {"control": 0}  # it drops the newest instead
    assert sum(book.other for book in held.values()) <= len(held)  # a record that its writer died in, at most one each


def overwritten_of(held: dict[tuple[str, str], Book], ring: str) -> int:
    return sum(book.overwritten for (_, name), book in held.items() if name == ring)


def test_requests_that_a_collector_saw_are_whole_and_there_once(starved: Starved) -> None:
    rows = by_id(starved.run)
    for result in (*starved.healthy, *starved.collected_again):
        row = rows[result.id]
        assert (row["status"], row["finish"], row["partial"]) == ("finished", "length", False)
        assert (row["prompt_tokens"], row["output_tokens"]) == (result.prompt_tokens, result.output_tokens)


def test_requests_that_the_death_of_the_server_cut_off_are_lost(starved: Starved) -> None:
    rows = by_id(starved.run)
    seen = [result for result in starved.cut_off if result.id]  # without an id: its first token never came
    cut = [rows[result.id] for result in seen if result.error is not None]
    assert {row["status"] for row in cut} <= {"lost"}
    assert rows[starved.cut_id]["status"] == "lost"
    assert {rows[result.id]["status"] for result in seen if result.error is None} <= {"finished"}


def test_steps_are_in_the_session_once(starved: Starved) -> None:
    steps = starved.run.frames()["steps"]
    assert steps["step"].is_unique
    assert (steps["end_ns"] >= steps["scheduled_ns"]).all()
    held = books(starved.run.session)
    missing = steps["step"].max() - steps["step"].min() + 1 - len(steps)
    lost = held["engine_core", "detail"].overwritten
    assert 0 < missing <= lost, "steps are missing without a loss"
    # What is there of a step although its begin or its end was overwritten is no complete step.
    assert (steps["status"] == "incomplete").sum() <= 1


def test_nothing_is_left_of_a_session_that_died(starved: Starved) -> None:
    assert starved.rings_left == len(ROLES)
    assert ring_files(starved.run) == []
    assert starved.run.manifest.complete
    assert all(process.ended for process in starved.run.manifest.processes)
    assert gone([*starved.run.engine, starved.run.collector])


def test_hooks_that_raise_change_no_result(starved: Starved, raising: Raising) -> None:
    assert texts(raising.results[: len(QUESTIONS)]) == starved.run.answers
    assert [result.error for result in raising.results] == [None] * len(raising.results)


def test_hooks_that_raise_are_out_after_a_few_errors_and_counted(raising: Raising) -> None:
    manifest = raising.run.manifest
    assert {process.role for process in manifest.processes} == {*ROLES}
    for process in manifest.processes:
        assert len(process.errors) >= 3, process.role
        out = {hook["name"]: hook["why"] for hook in process.hooks if hook["status"] == "out"}
        assert out
        for name, count in process.errors.items():
            assert count <= 2 * ERRORS_UNTIL_OUT, name  # calls that were under way when it was taken out
            assert (count >= ERRORS_UNTIL_OUT) == (name in out), (name, count)
    # The log says each once and no more.
    assert raising.log.count("error in the hook on") == sum(len(process.errors) for process in manifest.processes)
    assert "Exception ignored" not in raising.log
    assert manifest.complete
    assert ring_files(raising.run) == []
