"""Tests that every number of a report, a story and a comparison can be traced to its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner
from unit.test_latency_parts import told
from unit.test_report import built

from stagetrace.analysis import show_story
from stagetrace.analysis.definitions import DEFINITIONS, UnknownName, explain, names
from stagetrace.analysis.latency_parts import PARTS
from stagetrace.analysis.report import as_dict, summarise
from stagetrace.cli.main import app

PAGES = Path(__file__).parents[2] / "docs"


def number_keys(value: object, key: str = "") -> set[str]:
    """The keys whose values are numbers, at any depth."""
    if isinstance(value, dict):
        return set().union(*(number_keys(each, str(name)) for name, each in value.items()))
    if isinstance(value, list):
        return set().union(*(number_keys(each, key) for each in value))
    return {key} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


def test_every_number_of_a_report_is_defined(tmp_path: Path):
    builder = built(tmp_path / "s")
    builder.losses(read=10, overwritten=3)
    keys = number_keys(as_dict(summarise(builder.write())))
    assert {"p95_ns", "share", "overwritten", "finished"} <= keys
    for key in keys - {"pid", "process"}:
        assert explain(key), key


def test_every_number_of_a_story_is_defined(tmp_path: Path):
    story = show_story.as_dict(show_story.tell(told(tmp_path / "s").write(), "slow"))
    for passage in story["passages"]:
        passage.pop("notes")  # attributes of stages: docs/stages.md
    story.pop("facts")
    own = {"begin_ns", "step", "context", "steps_without", "by_phase", "value_ns", "p50_ns"}
    assert own & number_keys(story)
    for key in number_keys(story) - own - {"decode", "mixed", "prefill"}:
        assert explain(key), key


def test_every_part_has_a_definition():
    for name in PARTS:
        assert any(each.section == "Parts of a latency" for each in explain(name)), name


@pytest.mark.parametrize(
    ("name", "first"),
    [("tpot_p95", "tpot"), ("requests.latencies.ttft.p99_ns", "p99"), ("stage_forward", "forward"), ("ITL", "itl"),
     ("forward", "forward"), ("decode_context", "decode_context"), ("total_ns", "total_ns"), ("queue", "queue")],
)  # fmt: skip
def test_names_as_they_are_shown(name: str, first: str):
    assert explain(name)[0].name == first


@pytest.mark.parametrize("name", ["", "tpott", "no such thing", "p95x", "\x1b[2J"])
def test_a_name_that_is_not_known_is_an_error_that_names_others(name: str):
    with pytest.raises(UnknownName, match="is not a number that is known here"):
        explain(name)


def test_names_are_unique_and_all_can_be_explained():
    assert len({each.name for each in DEFINITIONS}) == len(DEFINITIONS)
    assert all(explain(name) for name in names())


@pytest.mark.parametrize("command", ["report"])
def test_one_flag_away(command: str):
    ran = CliRunner().invoke(app, [command, "--explain", "interference"])
    assert ran.exit_code == 0 and "does not mean" in ran.output and "  unit           ns" in ran.output
    assert "ttft" in CliRunner().invoke(app, [command, "--explain", "list"]).output.splitlines()
    wrong = CliRunner().invoke(app, [command, "--explain", "tpott"])
    assert wrong.exit_code == 2 and "did you mean tpot" in wrong.output


def test_pages_have_every_definition():
    text = (PAGES / "numbers.md").read_text("utf-8") + (PAGES / "comparison.md").read_text("utf-8")
    assert [each.name for each in DEFINITIONS if f"| `{each.name}` | {each.unit} |" not in text] == []
