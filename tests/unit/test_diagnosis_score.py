"""The benchmark that scores the diagnosis: its arithmetic, and that a seed plans the same sessions again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import advice
import diagnosis_score
from diagnosis_score import Case, Scored, figures
from on_purpose.plans import PLANS
from unit.simulated import Engine, simulate

from stagetrace.analysis.diagnosis.causes import BY_ID


def scored(cause: str, right: tuple[str, ...], *found: str) -> Scored:
    return Scored(Case(Path(cause), cause, right, "", 1), found)


def test_figures() -> None:
    found = figures(
        [
            scored("a", ("x",), "x", "y"),
            scored("a", ("x",), "y", "x"),
            scored("b", ("y",), "y"),
            scored("b", ("y",)),
            scored("clean", ()),
            scored("clean", (), "x"),
        ]
    )
    assert (found["sessions"], found["with_cause"], found["clean"]) == (6, 4, 2)
    assert (found["first_is_right"], found["clean_with_findings"]) == (0.5, 0.5)
    assert found["by_cause"]["x"] == {"sessions": 2, "precision": 0.5, "recall": 0.5}
    assert found["by_cause"]["y"] == {"sessions": 2, "precision": 0.5, "recall": 0.5}
    assert found["confusion"] == {"a": {"x": 1, "y": 1}, "b": {"y": 1, "nothing": 1}, "clean": {"nothing": 1, "x": 1}}
    assert [each["found"] for each in found["wrong"]] == [["y", "x"], [], ["x"]]


def test_without_sessions_there_are_no_shares() -> None:
    found = figures([])
    assert found["first_is_right"] is None and found["clean_with_findings"] is None


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str) -> None:
    one, same, other = (PLANS[name](random.Random(seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert {*one.right} <= {*BY_ID}
    assert len(one.asks) >= 10 and one.said
    assert (one.cause == "clean") == (not one.right)


@pytest.mark.parametrize("name", advice.WITH_ADVICE)
def test_advice_that_is_taken_is_what_the_cause_suggests(name: str) -> None:
    plan = PLANS[name](random.Random(1))
    assert plan.advised is not None and len(plan.right) == 1
    flag, before, after = advice.changed(plan.arguments, plan.advised)
    assert flag in {each.flag.split(" ")[0] for each in BY_ID[plan.right[0]].next[plan.engine.name]}
    assert before != after


def test_one_setting_is_changed_and_no_more() -> None:
    assert advice.changed(("--a", "--b", "1"), ("--b", "2", "--a")) == ("--b", "1", "2")
    assert advice.changed(("--a", "--b", "1"), ("--a",)) == ("--b", "1", "")
    for other in (("--a", "1"), ("--a", "2", "--b", "3")):
        with pytest.raises(ValueError, match="unpack"):
            advice.changed(("--a", "1"), other)


def test_sessions_that_were_kept_are_scored_again(tmp_path: Path) -> None:
    for name, engine, right in (("batch_cap-1", Engine(width=12, cap=3), ["batch_cap"]), ("clean-1", Engine(), [])):
        simulate(tmp_path / name / "session", engine)
        case = {"cause": name.partition("-")[0], "right": right, "said": name, "seed": 1}
        (tmp_path / name / diagnosis_score.CASE).write_text(json.dumps(case))
    command = [sys.executable, diagnosis_score.__file__, "--score", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["sessions"], found["first_is_right"], found["clean_with_findings"]) == (2, 1.0, 0.0)


@pytest.mark.parametrize(
    "arguments", [["--score", "/nowhere"], ["--only", "nothing_like_it"], ["--rounds", "0"], ["--seed", "one"]]
)
def test_bad_arguments(arguments: list[str]) -> None:
    command = [sys.executable, diagnosis_score.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
