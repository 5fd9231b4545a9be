"""Tests of how a summary is shown: on a terminal, in a pipe, as JSON, and by the command."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner
from unit.sessions import SessionBuilder

from stagetrace.analysis.report import Summary, as_dict, print_summary, summarise, to_json
from stagetrace.analysis.show import duration_text, number_text, plain, share_text
from stagetrace.cli.options import seconds
from stagetrace.cli.report import report
from stagetrace.exporters.session import Session

if TYPE_CHECKING:
    from pathlib import Path

EVIL = "model\x1b]0;owned\x07\x9b31m[red]not red[/red][link=http://x]\r\n\u202egnp.exe\ud800"


def built(path: Path, model: str = "tiny", **manifest: object) -> SessionBuilder:
    """Two requests and two steps, scheduler and rank apart, in a process that has a name and a model."""
    builder = SessionBuilder(path, **manifest)
    builder.process(info={"engine": "vllm", "engine_version": "0.32.0", "model": model})
    for number in (1, 2):
        begin = number * 1_000_000_000
        builder.request(
            number,
            begin + 500_000_000,
            arrival_ns=begin,
            first_token_ns=begin + 40_000_000,
            first_output_ns=begin + 50_000_000,
            last_token_ns=begin + 440_000_000,
            prompt_tokens=8,
            output_tokens=5,
        )
        phase = "prefill" if number == 1 else "decode"
        builder.step(number, begin, begin + 10_000_000, phase, unattributed_ns=1_000_000, output_tokens=1)
        builder.segment("execute", begin, begin + 9_000_000, number)
        at = {"process": 8, "thread": 80}
        rank = builder.segment("rank_step", begin, begin + 8_000_000, number, self_ns=2_000_000, **at)
        builder.segment("forward", begin, begin + 6_000_000, number, parent=rank, **at)
    builder.interval(2, 100_000_000, 4)
    builder.segment("idle", 1_010_000_000, 2_000_000_000)
    return builder


def shown(summary: Summary, terminal: bool = False, width: int = 80) -> str:
    out = io.StringIO()
    print_summary(
        summary, Console(file=out, force_terminal=terminal, width=width, color_system="standard" if terminal else None)
    )
    return out.getvalue()


# Plain text


def test_plain_text_has_no_escapes_boxes_or_wraps(tmp_path: Path):
    summary = summarise(built(tmp_path / ("long" * 30)).write())
    text = shown(summary, width=40)
    assert text == shown(summary, width=300)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2500-\u257f]", text)
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert f"  session   {tmp_path}/{'long' * 30}\n" in text


def test_plain_text_shows_the_numbers(tmp_path: Path):
    lines = [line.split() for line in shown(summarise(built(tmp_path / "s").write())).splitlines()]
    for wanted in (
        "engine vllm 0.32.0",
        "model tiny",
        "level step",
        "host host-a",
        "requests 2: 2 finished",
        "rates 1.33 requests/s, 6.67 output tokens/s, 17.3 total tokens/s over 1.50 s",
        "ttft 2 50.0 ms 50.0 ms 50.0 ms 50.0 ms",
        "tpot 2 100 ms 100 ms 100 ms 100 ms",
        "itl 4 100 ms 100 ms 100 ms 100 ms",
        "decode 1 10.0 ms 10.0 ms 10.0 ms 10.0 ms 0 0 1",
        "execute 2 18.0 ms 90.0% 9.00 ms 9.00 ms 9.00 ms",
        "unattributed 2 2.00 ms 10.0% 1.00 ms 1.00 ms 1.00 ms",
        "forward 2 12.0 ms 75.0% 6.00 ms 6.00 ms 6.00 ms",
        "unattributed 2 4.00 ms 25.0% 2.00 ms 2.00 ms 2.00 ms",
        "idle 1 990 ms 0 ns 990 ms 990 ms 990 ms",
        "Losses: none; 0 slots read; 0 accounting conflicts.",
    ):
        assert wanted.split() in lines, wanted
    (line,) = [line for line in lines if line[:2] == ["Not", "recorded"]]
    assert line[:4] == ["Not", "recorded", "at", "level"] and "attention," in line and line[-2:] == ["layer", "on)."]


def test_plain_text_in_an_encoding_without_micro(tmp_path: Path):
    builder = built(tmp_path / "s", model="modèle")
    builder.segment("gc_pause", 0, 5_500)
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    print_summary(summarise(builder.write()), Console(file=out, force_terminal=False))
    out.flush()
    assert b"5.50 us" in raw.getvalue() and rb"mod\xe8le" in raw.getvalue()


def test_overlapping_steps_are_said(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.step(1, 0, 3000)
    builder.segment("execute", 0, 2000, 1)
    text = shown(summarise(builder.write()))
    assert "add up to 2.00 µs, its steps to 3.00 µs: they differ where steps overlap, or" in text


def test_health_is_shown(tmp_path: Path):
    builder = built(tmp_path / "s", counts={"accounting_conflict": 1})
    builder.losses(read=10, overwritten=3, torn=1)
    builder.process(5, hooks=[{"name": "core:f", "status": "mismatch", "why": "takes [x]"}], errors={"core:f": 2})
    text = shown(summarise(builder.write()))
    assert "Losses: 3 overwritten, 1 torn; 10 slots read; 1 accounting conflict." in text
    assert re.search(r"core:f +mismatch +takes \[x\] +1\n", text)
    assert re.search(r"Errors of stagetrace's own, contained\n +hook +errors\n +core:f +2\n", text)


# Terminal


def test_terminal_gets_boxes_and_the_same_cells(tmp_path: Path):
    text = shown(summarise(built(tmp_path / "s").write()), terminal=True, width=160)
    assert "\x1b[1m" in text and "\u2500" in text
    assert re.search(r"execute +2 +18.0 ms +90.0% +9.00 ms", text)


@pytest.mark.parametrize("terminal", [False, True])
def test_names_from_outside_cannot_steer_the_terminal(tmp_path: Path, terminal: bool):
    builder = built(tmp_path / "s", model=EVIL.replace("\ud800", ""), host=EVIL.replace("\ud800", ""))
    hook = {"name": "\x1b[2Jhook", "status": "missing", "why": "[/]\x1b[1A"}
    builder.process(5, hooks=[hook], errors={"\x1b[2Jhook": 1})
    text = shown(summarise(builder.write()), terminal, width=400)
    text = re.sub(r"\x1b\[[01]m", "", text)  # rich's own bold
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"model\x1b]0;owned\x07\x9b31m[red]not red[/red][link=http://x]\r\n\u202egnp.exe" in text
    assert r"\x1b[2Jhook" in text and r"[/]\x1b[1A" in text


def test_plain_bounds_and_spells_out():
    assert plain("a" * 1000) == "a" * 200 + "..."
    assert plain(EVIL).isprintable() and plain("Qwen/Qwen3-0.6B é 模型") == "Qwen/Qwen3-0.6B é 模型"
    assert plain("\u2028\ufeff\u200b") == r"\u2028\ufeff\u200b"


# Cells


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (None, "-"),
        (0, "0 ns"),
        (1, "1.00 ns"),
        (999, "999 ns"),
        (999.6, "1.00 µs"),
        (1_234, "1.23 µs"),
        (9_999, "10.0 µs"),
        (12_345, "12.3 µs"),
        (999_499, "999 µs"),
        (999_500, "1.00 ms"),
        (123_456_789, "123 ms"),
        (1_500_000_000, "1.50 s"),
        (4_321_000_000_000, "4321 s"),
    ],
)
def test_duration_text(nanoseconds: float | None, text: str):
    assert duration_text(nanoseconds) == text


def test_numbers_and_shares():
    assert [number_text(number) for number in (None, 12345, 0.0, 0.01234, 9.999, 1234.5)] == [
        "-", "12345", "0", "0.0123", "10.0", "1234",
    ]  # fmt: skip
    assert [share_text(share) for share in (None, 0.0, 0.12345, 1.0)] == ["-", "0.0%", "12.3%", "100.0%"]


# JSON


def test_json_is_one_object_that_survives_a_round_trip(tmp_path: Path):
    builder = built(tmp_path / "s", model=EVIL.replace("\ud800", ""))
    builder.losses(read=10, overwritten=3)
    summary = summarise(builder.write(), last_s=60)
    text = to_json(summary)
    assert text.isascii() and "\x1b" not in text
    data = json.loads(text)
    assert data == as_dict(summary)
    assert data["session"]["engines"] == [{"name": "vllm", "version": "0.32.0", "model": EVIL.replace("\ud800", "")}]
    assert data["session"]["last_s"] == 60
    assert data["requests"]["latencies"]["ttft"] == {
        "count": 2, "mean_ns": 50_000_000, "p50_ns": 50_000_000, "p95_ns": 50_000_000, "p99_ns": 50_000_000,
    }  # fmt: skip
    assert data["requests"]["latencies"]["output"] == {
        "count": 0, "mean_ns": None, "p50_ns": None, "p95_ns": None, "p99_ns": None,
    }  # fmt: skip
    assert data["steps"]["by_phase"]["prefill"]["total_ns"] == 10_000_000
    scheduler, rank = data["timelines"]
    assert [(row["stage"], row["self_ns"], row["share"]) for row in scheduler["stages"]] == [
        ("execute", 18_000_000, 0.9),
        ("unattributed", 2_000_000, 0.1),
    ]
    assert (rank["share_of"], rank["envelope_ns"], rank["stages"][0]["share"]) == ("rank_step", 16_000_000, 0.75)
    assert data["losses"]["by_reason"]["overwritten"] == 3 and data["losses"]["rings"][0]["lost"] == 3


def test_json_keys_are_documented(tmp_path: Path):
    from pathlib import Path as Files

    builder = built(tmp_path / "s")
    builder.losses(read=10, overwritten=3)
    builder.process(5, hooks=[{"name": "core:f", "status": "missing", "why": ""}])
    page = (Files(__file__).parents[2] / "docs" / "numbers.md").read_text("utf-8")

    def fixed(value: object) -> set[str]:
        if isinstance(value, list):
            return set().union(*(fixed(each) for each in value))
        if not isinstance(value, dict):
            return set()
        named = {
            "latency_parts",
            "parts",
            "by_status",
            "latencies",
            "itl_by_phase",
            "by_phase",
            "by_reason",
            "contained_errors",
            "counts",
        }
        keys = {key for key in value if key not in ("prefill", "decode")}
        inner = (fixed(each if key not in named else list(each.values())) for key, each in value.items())
        return keys.union(*inner)

    found = fixed(as_dict(summarise(builder.write())))
    reasons = {
        "overwritten",
        "dropped",
        "torn",
        "unfinished",
        "corrupt",
        "given_up",
        "incomplete",
    }  # rows of the table of losses
    assert {"p95_ns", "share", "requests_per_s", "why"} <= found
    assert {key for key in found - reasons if f"`{key}`" not in page} == set()
    assert {reason for reason in reasons if f"| {reason} |" not in page} == set()


# Nothing to show


def test_no_process_names_both_causes_and_the_remedy(tmp_path: Path):
    summary = summarise(SessionBuilder(tmp_path / "s").write())
    text = shown(summary)
    assert summary.message is not None and "no supported engine" in summary.message
    assert re.search(r"VLLM_PLUGINS or SGLANG_PLUGINS.* add `stagetrace`", text, re.S)
    assert "Latencies" not in text and "Stages" not in text and "Not recorded" not in text


def test_session_before_the_first_commit_is_one_without_a_process(tmp_path: Path):
    session = SessionBuilder(tmp_path / "s").session
    assert "No process has opened a ring" in shown(summarise(session))


def test_no_request_points_at_requests_hooks_and_losses(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.process(hooks=[{"name": "core:f", "status": "missing", "why": "gone"}])
    text = shown(summarise(builder.write()))
    assert "\nWhat to do: send requests to the server" in text and "VLLM_PLUGINS" not in text
    assert "core:f" in text


def test_recording_off_is_said(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s", level="off")
    builder.process()
    assert "recording is off" in shown(summarise(builder.write()))


def test_empty_window_points_at_last(tmp_path: Path):
    session = built(tmp_path / "s", complete=False, anchors=[(0, 0)]).write()
    text = shown(summarise(session, 90))
    assert "Nothing ended in the last 90.0 s" in text and "leave --last out" in text
    assert summarise(session).message is None


# The command


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(report)
    return app


def test_command_takes_the_newest_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: typer.Typer):
    import os

    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("b-new", "a-old")):
        session = built(tmp_path / "stagetrace-sessions" / name, model=name).write()
        os.utime(session.path / "session.json", ns=(10**18 - number, 10**18 - number))
    done = CliRunner().invoke(command, [])
    assert done.exit_code == 0, done.output
    assert "b-new" in done.stdout and "a-old" not in done.stdout
    assert "\x1b" not in done.stdout


def test_command_writes_json_of_a_window(tmp_path: Path, command: typer.Typer):
    session = built(tmp_path / "s").write()
    done = CliRunner().invoke(command, [str(session.path), "--json", "--last", "1s"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["requests"]["count"] == 1 and data["session"]["last_s"] == 1
    assert [step["count"] for step in data["steps"]["by_phase"].values()] == [1]


def test_command_without_a_session_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: typer.Typer
):
    monkeypatch.chdir(tmp_path)
    for arguments, hint in ([], "stagetrace run"), ([str(tmp_path)], "is not a stagetrace session"):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 2
        assert hint in done.stderr and done.stdout == ""


def test_command_names_a_damaged_table(tmp_path: Path, command: typer.Typer):
    session: Session = built(tmp_path / "s").write()
    (session.path / "tables" / "requests" / "part-00000001.parquet").write_bytes(b"nothing")
    done = CliRunner().invoke(command, [str(session.path)])
    assert done.exit_code == 2 and "tables/requests" in done.stderr


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2d ", 172800)])
def test_seconds(text: str, value: float):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "m", "0", "0s", "-5m", "10 minutes", "1e3", "nan", "\u0661\u0660m"])
def test_what_is_no_length_of_time(text: str, tmp_path: Path, command: typer.Typer):
    with pytest.raises(typer.BadParameter):
        seconds(text)
    done = CliRunner().invoke(command, [str(built(tmp_path / "s").write().path), f"--last={text}"])
    assert done.exit_code == 2 and "is not a length of time" in done.stderr.replace("\n", " ")
