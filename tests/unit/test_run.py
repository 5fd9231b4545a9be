"""Tests of `stagetrace run` with real commands: it must not be noticed by them, and its session must be whole."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from unit.commands import PATIENCE_S, RECORDING, STAGETRACE, Commands, commands_in, said, wait_for
from unit.recording import STEPS

from stagetrace.exporters.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator

# Appends the name of every signal that comes to the file; ends half a second after the first, so that a second counts.
COUNTS_SIGNALS = """
import os, signal, sys, time
came = []
def note(number, frame):
    came.append(number)
    with open(sys.argv[1], "a") as file:
        file.write(signal.Signals(number).name + "\\n")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, note)
open(sys.argv[1] + ".ready", "w").close()
while not came:
    time.sleep(0.02)
time.sleep(0.5)
sys.exit(7)
"""

# What a command can see of who started it, but for its parent and its group.
DESCRIBES_ITSELF = """
import json, os
print(json.dumps({
    "files": sorted(os.listdir("/proc/self/fd")),
    "nice": os.nice(0),
    "directory": os.getcwd(),
    "mask": oct(os.umask(0)),
    "variables": dict(os.environ),
}))
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


def run(commands: Commands, *arguments: str | Path, **more: object) -> subprocess.Popen[bytes]:
    return commands.start(STAGETRACE, "run", "--session", commands.directory / "session", *arguments, **more)


def ended(process: subprocess.Popen[bytes], given: bytes | None = None) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a process that ends by itself."""
    out, err = process.communicate(given, PATIENCE_S)
    return process.returncode, out.decode(), err.decode()


def session_of(commands: Commands) -> Session:
    return Session.open(commands.directory / "session")


def collectors_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [one for one in children if one.status() != psutil.STATUS_ZOMBIE and "--beside" in one.cmdline()]


def collector_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    (found,) = collectors_of(process)
    return found


# Exit status


def test_exit_status_is_the_commands(commands: Commands):  # success: in most of the tests below
    assert ended(run(commands, "--no-report", "--", "sh", "-c", "exit 3"))[0] == 3
    wait_for(lambda: session_of(commands).read_manifest().complete)  # the collector may need longer than run waits


def test_a_command_that_is_not_there(commands: Commands):
    status, _, err = ended(run(commands, "--", "no-such-command"))
    assert status == 127
    assert "no-such-command" in err
    assert "Traceback" not in err


def test_a_command_that_cannot_be_executed(commands: Commands):
    file = commands.directory / "plain.txt"
    file.write_text("text\n")
    status, _, err = ended(run(commands, "--", file))
    assert status == 126
    assert "plain.txt" in err and "Permission denied" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["TERM", "INT", "KILL"])
def test_death_by_a_signal_is_passed_on(commands: Commands, name: str):
    status, out, err = ended(run(commands, "--", "sh", "-c", f"kill -{name} $$"))
    assert status == -signal.Signals[f"SIG{name}"]
    assert "Traceback" not in err
    assert out.endswith(f"session: {commands.directory / 'session'}\n")  # after all of the report
    assert session_of(commands).read_manifest().complete


# Signals and terminal


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_run_reaches_the_command_once(commands: Commands, name: str):
    came = commands.directory / "came"
    process = run(commands, "--no-report", "--", sys.executable, "-c", COUNTS_SIGNALS, came)
    wait_for(came.with_suffix(".ready").exists)
    process.send_signal(signal.Signals[name])
    status, out, _ = ended(process)
    assert came.read_text().split() == [name]
    assert status == 7
    assert out.startswith("session: ")


def on_a_terminal(commands: Commands, *arguments: str | Path) -> tuple[subprocess.Popen[bytes], int]:
    """`run` as the foreground of a terminal of its own, and the terminal's other end."""
    ours, theirs = os.openpty()
    process = run(
        commands,
        *arguments,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    return process, ours


def read_terminal(descriptor: int) -> str:
    """All that was printed, once nobody holds the terminal any longer."""
    shown = b""
    try:
        while piece := os.read(descriptor, 4096):
            shown += piece
    except OSError:  # EIO: the other end is closed
        pass
    os.close(descriptor)
    return shown.decode().replace("\r\n", "\n")


def test_ctrl_c_reaches_the_command_once_and_run_reports(commands: Commands):
    came = commands.directory / "came"
    process, terminal = on_a_terminal(commands, "--", sys.executable, "-c", COUNTS_SIGNALS, came)
    wait_for(came.with_suffix(".ready").exists)
    os.write(terminal, b"\x03")
    shown = read_terminal(terminal)
    assert process.wait(PATIENCE_S) == 7
    assert came.read_text().split() == ["SIGINT"]
    assert "stagetrace report" in shown
    assert shown.endswith(f"session: {commands.directory / 'session'}\n")
    assert session_of(commands).read_manifest().complete  # the collector is out of the terminal's reach


def test_a_hangup_reaches_the_command_once(commands: Commands):
    # `ssh -t host stagetrace run ...`: run leads the terminal's session, and the kernel tells the leader alone.
    came = commands.directory / "came"
    process, terminal = on_a_terminal(commands, "--", sys.executable, "-c", COUNTS_SIGNALS, came)
    wait_for(came.with_suffix(".ready").exists)
    os.close(terminal)
    assert process.wait(PATIENCE_S) == 7
    assert came.read_text().split() == ["SIGHUP"]
    wait_for(lambda: session_of(commands).read_manifest().complete)


def test_no_thread_takes_a_signal_that_is_the_commands(commands: Commands):
    """A signal goes to any thread that does not block it, and would end `run` instead of reaching the command."""
    process = run(commands, "--", "sleep", "1000")
    children = psutil.Process(process.pid).children
    wait_for(lambda: any(child.name() == "sleep" for child in children()))
    threads = [thread for thread in Path(f"/proc/{process.pid}/task").iterdir() if thread.name != str(process.pid)]
    assert threads  # Arrow's; the main thread waits for these very signals
    for thread in threads:
        blocked = signals_blocked_by(thread.name)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            assert blocked >> number - 1 & 1, (thread.name, number)
    (collector,) = [child for child in children() if child.name() != "sleep"]
    wait_for(lambda: signals_blocked_by(collector.pid) == 0)
    process.terminate()
    assert process.wait(PATIENCE_S) == -signal.SIGTERM


def signals_blocked_by(thread: str | int) -> int:
    return int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{thread}/status").read_text())[1], 16)


def test_stdin_and_stdout_are_the_commands_own(commands: Commands):
    process = run(commands, "--no-report", "--", "cat", stdin=subprocess.PIPE)
    status, out, _ = ended(process, b"one\ntwo\n")
    assert status == 0
    assert out == f"one\ntwo\nsession: {commands.directory / 'session'}\n"


def test_the_command_is_as_it_would_be_without_run(commands: Commands):
    describe = (sys.executable, "-c", DESCRIBES_ITSELF)
    alone = json.loads(ended(commands.start(*describe))[1])
    under = json.loads(ended(run(commands, "--no-report", "--level", "request", "--", *describe))[1].splitlines()[0])
    armed = {"STAGETRACE_SESSION": str(commands.directory / "session"), "STAGETRACE_LEVEL": "request"}
    assert under.pop("variables") == alone.pop("variables") | armed
    assert under == alone


def test_the_command_finds_no_signal_ignored_or_blocked(commands: Commands):
    # Python ignores SIGPIPE, which a command must not inherit: `yes | head` would never end.
    _, out, _ = ended(run(commands, "--no-report", "--", "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"))
    words = [line.split() for line in out.splitlines()[:2]]
    assert [name for name, _ in words] == ["SigBlk:", "SigIgn:"]
    glibcs_own = 0b11 << 31  # posix_spawn leaves the two signals of glibc's threads ignored until it needs them
    assert [int(mask, 16) & ~glibcs_own for _, mask in words] == [0, 0]


def test_log_takes_the_commands_output(commands: Commands):
    log = commands.directory / "server.log"
    status, out, err = ended(run(commands, "--no-report", "--log", log, "--", "sh", "-c", "echo said; echo told >&2"))
    assert status == 0
    assert log.read_text() == "said\ntold\n"
    assert out == f"session: {commands.directory / 'session'}\n"
    assert "told" not in err


# What is refused


def test_a_session_that_exists_is_refused(commands: Commands):
    assert ended(run(commands, "--", "true"))[0] == 0  # the report waits for the collector, however busy the machine
    before = sorted(path for path in commands.directory.rglob("*"))
    touched = commands.directory / "touched"
    status, _, err = ended(run(commands, "--", "touch", touched))
    assert status == 2
    assert "holds a session already" in err
    assert sorted(path for path in commands.directory.rglob("*")) == before


def test_an_unknown_level_is_refused(commands: Commands):
    status, _, err = ended(run(commands, "--level", "everything", "--", "true"))
    assert status == 2
    assert "'everything'" in err and "step" in err
    assert not (commands.directory / "session").exists()


def test_a_session_that_cannot_be_made_is_refused(commands: Commands):
    (commands.directory / "session").write_text("a file\n")
    status, _, err = ended(run(commands, "--", "true"))
    assert status == 2
    assert "cannot record into" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (("--marks", "attention,experts"), {}, "'experts': choose some of attention, mlp, moe, collective"),
        ((), {"STAGETRACE_MARKS": "experts"}, "'experts': choose some of attention, mlp, moe, collective"),
        (("--marks", "moe", "--mark-layers", "0"), {}, "in 0 layers: choose 1 or more"),
        (("--marks", "moe"), {"STAGETRACE_MARK_LAYERS": "all"}, "STAGETRACE_MARK_LAYERS"),
    ],
)
def test_marks_that_cannot_be_put_are_refused(
    commands: Commands, arguments: tuple[str, ...], variables: dict[str, str], named: str
):
    environment = {**commands.environment, **variables}
    status, _, err = ended(run(commands, *arguments, "--", "true", env=environment))
    assert status == 2
    assert named in err
    assert not (commands.directory / "session").exists()


def test_a_log_that_cannot_be_written_is_named(commands: Commands):
    log = commands.directory / "missing" / "server.log"
    status, _, err = ended(run(commands, "--log", log, "--", "true"))
    assert status == 2
    assert f"cannot write {log}" in err


def test_a_collector_that_cannot_be_started_is_named_and_the_command_runs(commands: Commands):
    # Its log cannot be opened: as when the disk fills up between making the session and starting the collector.
    path = commands.directory / "session"
    (path / "collector.log").mkdir(parents=True)
    status, out, err = ended(run(commands, "--no-report", "--", "sh", "-c", "sleep 0.1; echo ran"))
    assert status == 0
    assert out.startswith("ran\n")
    assert "the collector cannot be started" in err and "no collector could be started" in err
    assert "Traceback" not in err


# What is said


def test_a_command_that_records_nothing_is_told_what_to_do(commands: Commands):
    status, out, _ = ended(run(commands, "--", "true"))
    assert status == 0
    assert "VLLM_PLUGINS" in out
    assert "What to do: " in out
    assert not re.search(r"^(Requests|Latencies|Steps|Stages)", out, re.MULTILINE)


def test_a_list_of_plugins_is_completed_and_said(commands: Commands):
    environment = {**commands.environment, "VLLM_PLUGINS": "mine"}
    status, out, err = ended(run(commands, "--no-report", "--", "sh", "-c", "echo $VLLM_PLUGINS", env=environment))
    assert status == 0
    assert out.splitlines()[0] == "mine,stagetrace"
    assert "VLLM_PLUGINS=mine,stagetrace" in err


def test_marks_reach_the_command_and_a_note_says_when_they_are_read(commands: Commands):
    script = "echo $STAGETRACE_MARKS $STAGETRACE_MARK_LAYERS $STAGETRACE_MAX_LEVEL"
    environment = {**commands.environment, "STAGETRACE_MARK_LAYERS": "9"}
    given = ("--no-report", "--marks", "moe,attention", "--", "sh", "-c", script)
    status, out, err = ended(run(commands, *given, env=environment))
    assert status == 0
    assert out.splitlines()[0] == "attention,moe 9 layer"
    assert f"stagetrace ctl level layer --session {commands.directory / 'session'}" in err


def test_layers_for_no_marks_are_said(commands: Commands):
    status, _, err = ended(run(commands, "--no-report", "--mark-layers", "2", "--", "true"))
    assert status == 0
    assert "--marks attention,mlp,moe,collective" in err


# What is recorded


def test_what_the_command_records_is_reported(commands: Commands):
    status, out, err = ended(run(commands, "--", sys.executable, RECORDING, "--requests", "8"))
    assert status == 0
    assert "stagetrace: " in err and "ended" not in err  # recording into ..., and no trouble
    assert re.search(r"^ *requests +8: 8 finished$", out, re.MULTILINE)
    session = session_of(commands)
    manifest = session.read_manifest()
    assert manifest.complete and manifest.command[1] == str(RECORDING)
    assert [process.ended for process in manifest.processes] == [True]
    assert sum(losses.lost for losses in manifest.losses) == 0
    assert manifest.counts.get("accounting_conflict", 0) == 0
    assert session.read_table("requests")["status"].to_pylist() == ["finished"] * 8
    assert session.read_table("steps")["status"].to_pylist() == ["complete"] * 8 * STEPS
    assert not any(commands.rings.iterdir())  # the session's directory went with its last ring


def test_sessions_go_under_the_current_directory_unless_told_otherwise(commands: Commands):
    status, out, _ = ended(commands.start(STAGETRACE, "run", "--no-report", "--", "true"))
    assert status == 0
    path = commands.directory / out.strip().removeprefix("session: ")
    assert path.parent == commands.directory / "stagetrace-sessions"
    assert Session.newest(path.parent).path == path


def test_files_of_the_current_directory_are_not_taken_for_modules(commands: Commands):
    (commands.directory / "random.py").write_text("raise RuntimeError('not the standard library')\n")
    (commands.directory / "stagetrace").mkdir()
    status, _, err = ended(run(commands, "--no-report", "--", "true"))
    assert status == 0
    assert "failed" not in err
    wait_for(lambda: session_of(commands).read_manifest().complete)


def test_a_ring_directory_that_is_relative_is_one_for_all(commands: Commands):
    environment = {**commands.environment, "STAGETRACE_RING_DIR": "rings"}
    elsewhere = f"cd / && exec {sys.executable} {RECORDING} --requests 1"
    assert ended(run(commands, "--no-report", "--", "sh", "-c", elsewhere, env=environment))[0] == 0
    wait_for(lambda: session_of(commands).read_manifest().complete)
    assert session_of(commands).read_table("requests").num_rows == 1


# What dies


def test_the_collector_outlives_run_as_long_as_the_engine(commands: Commands):
    until = commands.directory / "until"
    process = run(commands, "--", sys.executable, RECORDING, "--requests", "3", "--until", until)
    assert said(process) == "recorded 3 requests"
    session = session_of(commands)
    wait_for(lambda: session.read_manifest().processes)  # its ring was found
    collector = collector_of(process)
    process.kill()
    process.wait()
    with pytest.raises(psutil.TimeoutExpired):
        collector.wait(1.0)
    assert not session.read_manifest().complete
    until.touch()
    collector.wait(PATIENCE_S)
    assert session.read_manifest().complete
    assert session.read_table("requests").num_rows == 3


def test_the_collector_outlives_run_as_long_as_the_command(commands: Commands):
    process = run(commands, "--", "sleep", "60")
    wait_for((commands.directory / "session" / "manifest.json").exists)
    collector = collector_of(process)
    (command,) = [one for one in psutil.Process(process.pid).children() if one.pid != collector.pid]
    process.kill()
    process.wait()
    with pytest.raises(psutil.TimeoutExpired):
        collector.wait(0.5)  # its engine may still be starting
    command.kill()
    collector.wait(PATIENCE_S)
    assert session_of(commands).read_manifest().complete


def test_a_dead_collector_does_not_hurt_the_command(commands: Commands):
    until = commands.directory / "until"
    process = run(commands, "--", sys.executable, RECORDING, "--requests", "3", "--until", until)
    assert said(process) == "recorded 3 requests"
    wait_for(lambda: session_of(commands).read_manifest().processes)
    killed = collector_of(process)
    killed.kill()
    wait_for(lambda: psutil.Process(process.pid).children() != [killed] and killed not in collectors_of(process))
    wait_for(lambda: collectors_of(process))
    until.touch()
    status, out, err = ended(process)
    assert status == 0
    assert "the collector was ended by signal 9; the command goes on" in err
    assert out.endswith(f"session: {commands.directory / 'session'}\n")
    session = session_of(commands)
    assert session.read_manifest().complete
    assert session.read_table("requests")["status"].to_pylist() == ["finished"] * 3


def test_a_collector_that_died_right_before_the_end_is_made_up_for(commands: Commands):
    until = commands.directory / "until"
    process = run(commands, "--", sys.executable, RECORDING, "--requests", "3", "--until", until)
    assert said(process) == "recorded 3 requests"
    wait_for(lambda: session_of(commands).read_manifest().processes)
    killed = collector_of(process)
    until.touch()
    killed.kill()
    assert ended(process)[0] == 0
    session = session_of(commands)
    assert session.read_manifest().complete
    assert session.read_table("requests")["status"].to_pylist() == ["finished"] * 3


def test_a_collector_that_cannot_work_is_named_and_the_command_goes_on(commands: Commands):
    until = commands.directory / "until"
    process = run(commands, "--no-report", "--", sys.executable, RECORDING, "--requests", "1", "--until", until)
    assert said(process) == "recorded 1 requests"
    session = session_of(commands)
    wait_for(lambda: session.read_manifest().processes)
    (session.path / "manifest.json").write_text("{")
    collector_of(process).kill()
    (session.path / "manifest.json").write_text("{")
    wait_for(lambda: "is not JSON" in session.log.read_text())
    until.touch()
    status, _, err = ended(process)
    assert status == 0
    assert "the collector ended (exit status 2); the command goes on" in err or "the collector failed" in err
    assert f"stagetrace collect {session.path}" in err
    for ring in commands.ring_files():  # what no collector could take
        ring.unlink()


def test_an_engine_that_is_killed_is_in_the_session(commands: Commands):
    recording = (sys.executable, RECORDING, "--requests", "2", "--open", "1", "--die")
    status, out, _ = ended(run(commands, "--", *recording))
    assert status == -signal.SIGKILL
    assert out.endswith(f"session: {commands.directory / 'session'}\n")
    session = session_of(commands)
    assert sorted(session.read_table("requests")["status"].to_pylist()) == ["finished", "finished", "lost"]
    assert session.read_table("steps")["status"].to_pylist().count("incomplete") == 1
