"""Tests of the environment that arms an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagetrace.exporters.arm import armed_environment

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
