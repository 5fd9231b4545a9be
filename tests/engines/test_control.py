"""A real server under load while commands look at it: `stagetrace top`, and `stagetrace ctl` with what it cuts."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from engines.recording import STAGETRACE, Recording, ask, record
from quickstart.load import Request, Result
from unit.commands import Commands, wait_for
from unit.terminal import Terminal

from stagetrace.exporters.control import set_level
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from pathlib import Path

SHORT = Request(({"role": "user", "content": "short"},), max_tokens=10)
LONG = Request(
    ({"role": "user", "content": "long"},), max_tokens=3000
)  # longer than anything else that is done meanwhile


def ctl(recording: Recording, *words: str) -> str:
    done = subprocess.run(
        [*STAGETRACE, "ctl", *words, "--session", str(recording.path)],
        capture_output=True,
        text=True,
        check=True,
        env={"STAGETRACE_RING_DIR": str(recording.path.parent / "rings"), "PATH": ""},
    )
    return done.stdout


def watched(recording: Recording) -> list[Result]:
    """Requests one after the other until `stagetrace top` has shown them in a terminal; what they were."""
    results: list[Result] = []
    seen = threading.Event()
    screen = ""

    def shown() -> bool:
        """Whether a whole screen has a line with ttft beside prefill steps, and one with tpot beside decode steps."""
        nonlocal screen
        screen = terminal.screen()
        served = re.search(r"^ttft +[1-9].*\n+tpot .*  decode +[1-9]", screen, re.M)
        return served is not None and screen.rstrip().endswith("q ends")

    def load() -> None:
        while not seen.is_set():
            results.extend(ask(recording.server, SHORT))

    terminal = Terminal(
        Commands(recording.path.parent), recording.path, "--interval", "0.5s", "--window", "20s", rows=50, columns=140
    )
    thread = threading.Thread(target=load)
    thread.start()
    try:
        wait_for(shown, 90)
    except TimeoutError:
        terminal.process.kill()
        raise AssertionError(f"it did not show them, but\n{screen}") from None
    finally:
        seen.set()
        thread.join()
    os.write(terminal.ours, b"q")
    assert terminal.ended() == 0
    assert re.match(r"stagetrace top  recording [\d.]+ m?s.*  level step  vllm 0\.\d+", screen), screen
    assert re.search(r"^requests .*[1-9][\d.]*/s finished  0 aborted", screen, re.M), screen
    assert re.search(r"^tokens/s .*[1-9][\d.,k]* prompt  .*[1-9][\d.,k]* output", screen, re.M), screen
    assert re.search(r"^losses +none, [1-9]", screen, re.M), screen
    assert re.search(r"^errors +none", screen, re.M), screen
    assert all(f"{role} " in screen for role in ("engine_core", "worker", "front_end")), screen
    assert all(re.search(rf"{stage} \d", screen) for stage in ("forward", "schedule", "detokenize")), screen
    return results


def test_levels_at_run_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(tmp_path / "rings"))
    with record(model, tmp_path, "--enforce-eager") as recording:
        server = recording.server
        before = watched(recording) + ask(server, SHORT, SHORT)
        long: list[Result] = []
        thread = threading.Thread(target=lambda: long.extend(ask(server, LONG)))
        thread.start()
        time.sleep(1.5)
        # Not by the command here: on two busy cores it takes seconds to start, and the long request would be over.
        assert len(set_level(recording.session, Level.OFF)) == 3
        disarmed_at = time.monotonic_ns()
        unseen = ask(server, SHORT, SHORT)
        time.sleep(1.0)
        armed_at = time.monotonic_ns()
        assert {switched.before for switched in set_level(recording.session, Level.STEP)} == {Level.OFF}
        thread.join()
        after = ask(server, SHORT, SHORT)
        assert ctl(recording, "disarm").count("step -> off") == 3
        assert ctl(recording, "arm").count("off -> step") == 3
        assert ctl(recording, "level", "request").count("step -> request") == 3
        requests_only_at = time.monotonic_ns()
        shallow = ask(server, SHORT)
        time.sleep(0.2)  # its last records, at this level
    assert {result.error for result in (*before, *long, *unseen, *after, *shallow)} == {None}
    frames = recording.frames()
    requests = frames["requests"].set_index("external_id")
    whole = requests[~requests["partial"]]
    seen = {result.id for result in (*before, *after, *shallow)}
    assert set(whole.index) == seen, whole[~whole.index.isin(seen)].T.to_string()
    assert set(whole["status"]) == {"finished"}
    assert set(whole["output_tokens"]) == {SHORT.max_tokens}
    assert not set(requests.index) & {result.id for result in unseen}
    assert requests.loc[long[0].id, "partial"]
    steps = frames["steps"]
    assert not ((steps["begin_ns"] > disarmed_at) & (steps["end_ns"] < armed_at)).any()
    assert not (steps["begin_ns"] > requests_only_at).any()
    complete = steps[steps["status"] == "complete"]
    assert len(complete) > 100
    assert set(steps["status"]) <= {"complete", "partial"}
    assert (steps["status"] == "partial").sum() <= 4
    assert complete["members"].notna().all()
    # No interval reaches over the time in which nothing was recorded.
    assert frames["intervals"]["interval_ns"].max() < armed_at - disarmed_at
    # Alone or with the short ones in the engine, the long request is in every step until it ends.
    manifest = recording.manifest
    assert manifest.counts["accounting_conflict"] == 0
    assert not any(process.errors for process in manifest.processes)
