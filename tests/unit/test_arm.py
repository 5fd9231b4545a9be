"""Tests of the environment that arms an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagetrace.exporters.arm import armed_environment, parse_marks
from stagetrace.instrument.device_marks import PLACES, Choice, choice

PLAIN = {"PATH": "/bin", "HOME": "/root"}


def test_adds_session_and_level_and_keeps_the_rest():
    environment = dict(PLAIN)
    armed, notes = armed_environment(environment, Path("/sessions/one"), "layer")
    assert armed == {**PLAIN, "STAGETRACE_SESSION": "/sessions/one", "STAGETRACE_LEVEL": "layer"}
    assert notes == []
    assert environment == PLAIN


def test_session_is_absolute_since_the_command_may_change_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    armed, _ = armed_environment(PLAIN, Path("sessions/one"), "step")
    assert armed["STAGETRACE_SESSION"] == str(tmp_path / "sessions/one")


def test_ring_directory_is_absolute_for_the_same_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    armed, _ = armed_environment({**PLAIN, "STAGETRACE_RING_DIR": "rings"}, Path("one"), "step")
    assert armed["STAGETRACE_RING_DIR"] == str(tmp_path / "rings")
    armed, _ = armed_environment({**PLAIN, "STAGETRACE_RING_DIR": ""}, Path("one"), "step")
    assert armed["STAGETRACE_RING_DIR"] == ""  # as good as not set


def test_what_armed_the_shell_before_is_replaced():
    before = {**PLAIN, "STAGETRACE_SESSION": "/sessions/old", "STAGETRACE_LEVEL": "off"}
    armed, _ = armed_environment(before, Path("/sessions/new"), "step")
    assert (armed["STAGETRACE_SESSION"], armed["STAGETRACE_LEVEL"]) == ("/sessions/new", "step")


@pytest.mark.parametrize(
    ("variable", "before", "after"),
    [
        ("VLLM_PLUGINS", "mine", "mine,stagetrace"),
        ("VLLM_PLUGINS", "mine,yours", "mine,yours,stagetrace"),
        ("VLLM_PLUGINS", "stagetrace_other", "stagetrace_other,stagetrace"),
        ("VLLM_PLUGINS", "", "stagetrace"),  # vLLM reads the empty list as none
        ("SGLANG_PLUGINS", "mine", "mine,stagetrace"),
    ],
)
def test_a_list_of_plugins_without_ours_gets_it_and_a_note(variable: str, before: str, after: str):
    armed, notes = armed_environment({**PLAIN, variable: before}, Path("/s"), "step")
    assert armed[variable] == after
    assert armed[f"STAGETRACE_{variable}"] == before
    (note,) = notes
    assert f"{variable}={after}" in note


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VLLM_PLUGINS", "stagetrace"),
        ("VLLM_PLUGINS", "mine,stagetrace,yours"),
        ("SGLANG_PLUGINS", "stagetrace"),
        ("SGLANG_PLUGINS", ""),  # SGLang reads the empty list as all: naming one would exclude the others
    ],
)
def test_a_list_of_plugins_that_loads_ours_is_left_alone(variable: str, value: str):
    armed, notes = armed_environment({**PLAIN, variable: value}, Path("/s"), "step")
    assert armed[variable] == value and f"STAGETRACE_{variable}" not in armed
    assert notes == []


def test_no_list_of_plugins_is_made_where_there_was_none():
    armed, _ = armed_environment(PLAIN, Path("/s"), "step")
    assert not {"VLLM_PLUGINS", "SGLANG_PLUGINS"} & armed.keys()


# Marks


@pytest.mark.parametrize(
    ("text", "layers", "chosen"),
    [
        ("", None, Choice()),
        (" , ", 7, Choice((), 7)),
        ("moe", None, Choice(("moe",), 4)),
        (" moe , attention,moe", 2, Choice(("attention", "moe"), 2)),
        (",".join(PLACES), 1, Choice(PLACES, 1)),
    ],
)
def test_marks_are_named_with_commas_between(text: str, layers: int | None, chosen: Choice):
    assert parse_marks(text, layers) == chosen


@pytest.mark.parametrize(("text", "named"), [("attention,experts", "experts"), ("MoE", "MoE"), ("moe;mlp", "moe;mlp")])
def test_marks_that_there_are_none_of_are_named_with_what_there_is(text: str, named: str):
    with pytest.raises(ValueError, match=repr(named)) as raised:
        parse_marks(text)
    assert ", ".join(PLACES) in str(raised.value)


@pytest.mark.parametrize("layers", [0, -3])
def test_marks_in_no_layer_are_refused(layers: int):
    with pytest.raises(ValueError, match=f"in {layers} layers: choose 1 or more"):
        parse_marks("moe", layers)


def test_marks_reach_the_engine_which_installs_the_hooks_that_launch_them():
    chosen = Choice(("attention", "moe"), 2)
    armed, notes = armed_environment(PLAIN, Path("/s"), "layer", marks=chosen)
    assert choice(armed) == chosen and "STAGETRACE_MAX_LEVEL" not in armed
    assert notes == []


@pytest.mark.parametrize("level", ["off", "request", "step"])
def test_marks_below_level_layer_are_captured_and_a_note_says_how_they_are_read(level: str):
    armed, (note,) = armed_environment(PLAIN, Path("/a b/s"), level, marks=Choice(("moe",)))
    assert (armed["STAGETRACE_LEVEL"], armed["STAGETRACE_MAX_LEVEL"]) == (level, "layer")
    assert "`stagetrace ctl level layer --session '/a b/s'`" in note and f"level {level} ends it" in note


@pytest.mark.parametrize(
    ("before", "maximum", "after"),
    [({}, "step", "layer"), ({"STAGETRACE_MAX_LEVEL": "step"}, None, "layer"), ({}, "kernel", "kernel")],
)
def test_marks_raise_the_hooks_that_were_asked_for_and_say_so(before: dict[str, str], maximum: str | None, after: str):
    armed, notes = armed_environment({**PLAIN, **before}, Path("/s"), "step", maximum, Choice(("moe",)))
    assert armed["STAGETRACE_MAX_LEVEL"] == after
    assert any("not only those of step" in note for note in notes) == (after == "layer")


def test_without_marks_none_come_from_the_shell():
    before = {**PLAIN, "STAGETRACE_MARKS": "moe", "STAGETRACE_MARK_LAYERS": "2"}
    armed, notes = armed_environment(before, Path("/s"), "step")
    assert not choice(armed).places and "STAGETRACE_MARK_LAYERS" not in armed
    assert notes == []
