"""Tests of what a report and doctor say of marks: spans by stage and kind of step, shares, and what was not told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from unit.test_definitions import number_keys
from unit.test_device_report import on_device, recorded
from unit.test_gap import ALONE, MS, in_parts, on_thread, worker
from unit.test_report import shown
from unit.test_speed_of_light import H100, built

from stagetrace.analysis.comparison.compare import compare
from stagetrace.analysis.comparison.sample import Side, sample
from stagetrace.analysis.definitions import explain
from stagetrace.analysis.gap import Part
from stagetrace.analysis.report import as_dict, summarise
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from unit.sessions import SessionBuilder

    from stagetrace.analysis.marks import MarkedStage

    Told = dict[tuple[str, str | None], MarkedStage]

US = 1_000
MARKS = {
    **{"by": "marks", "stages": ["attention", "moe"], "layers": [0, 31], "per_step": 12, "empty_ns": 1184},
    **dict.fromkeys(("left_out", "absent", "overwritten", "halves", "repeated", "backwards", "unplaced", "errors"), 0),
}


def marked(builder: SessionBuilder, stage: str, layer: int, begin_us: int, end_us: int, step: int, **at: Any) -> None:
    where = {"process": 1, "thread": 1, "a0": layer, "a1": 0, "a2": 9_000, **at}
    where.setdefault("parent_stage", BY_NAME["device_forward"].id)
    builder.segment(f"device_{stage}", begin_us * US, end_us * US, step, **where)


def with_marks(path: Path, **marks: Any) -> SessionBuilder:
    """Prefill (step 1) and two steps of decode of a model with 32 layers, all experts; layers 0 and 31 are marked."""
    builder = built(path, device_name=H100, **ALONE)
    worker(builder, 1, device="cuda", **ALONE, marks={**MARKS, **marks})
    for step, at, wide in ((1, 10, 100), (2, 210, 20), (3, 250, 20)):
        on_device(builder, "device_forward", at, at + wide, step)
        for layer in (0, 31):
            begin = at * 1000 + 100 * layer
            marked(builder, "attention", layer, begin, begin + wide, step)
            marked(builder, "moe", layer, begin + 200, begin + 200 + (3 if layer else 2) * wide, step)
    return builder


def told(builder: SessionBuilder) -> Told:
    (rank,) = summarise(builder.write()).marks
    return {(each.stage, each.phase): each for each in rank.stages}


def test_spans_by_stage_and_kind_of_step(tmp_path: Path):
    found = told(with_marks(tmp_path / "s"))
    kinds = ("prefill", "decode")
    assert [*found] == [(f"device_{stage}", kind) for stage in ("attention", "moe") for kind in kinds]
    prefill, decode = (found["device_moe", kind] for kind in kinds)
    assert (prefill.steps, prefill.layers, prefill.count, prefill.total_ns) == (1, 2, 2, 500 * US)
    assert (decode.steps, decode.layers, decode.count, decode.total_ns) == (2, 2, 4, 200 * US)
    assert (decode.duration.p50, decode.duration.count) == (50 * US, 4)
    assert [(each.layer, each.count, each.total_ns) for each in decode.by_layer] == [(0, 2, 80 * US), (31, 2, 120 * US)]
    assert decode.by_layer[1].duration.p99 == 60 * US


def test_shares_are_of_the_forward_passes_of_the_same_steps(tmp_path: Path):
    builder = with_marks(tmp_path / "s")
    on_device(builder, "device_forward", 300, 800, 4)  # a step that passed no marks
    marked(builder, "moe", 0, 900_000, 900_050, 77)  # one whose forward pass was not recorded, nor the step
    on_device(builder, "device_forward", 900, 901, 1, process=2)  # another rank's
    builder.process(key=2, role="worker", pid=3)
    found = told(builder)
    decode = found["device_moe", "decode"]
    assert decode.share == pytest.approx(200 * US / (40 * MS))
    assert decode.estimated_share == pytest.approx(decode.share * 32 / 2)
    lost = found["device_moe", None]
    assert (lost.steps, lost.count, lost.share, lost.estimated_share) == (0, 1, None, None)


def test_what_a_switch_of_the_level_cut_is_left_out(tmp_path: Path):
    builder = with_marks(tmp_path / "s")
    marked(builder, "moe", 0, 231_000, 231_900, 3, partial=True)
    assert told(builder)["device_moe", "decode"].count == 4


@pytest.mark.parametrize("why", ["no config", "pipeline", "layers that the model does not have"])
def test_nothing_is_estimated_of_a_model_that_is_not_known(tmp_path: Path, why: str):
    builder = with_marks(tmp_path / "s")
    if why == "no config":
        (tmp_path / "model" / "config.json").unlink()
    elif why == "pipeline":
        builder.manifest.processes[0].info["pipeline_parallel"] = 2
    else:
        for layer in range(40):
            marked(builder, "moe", layer, 212_000 + layer, 212_001 + layer, 2)
    moe = told(builder)["device_moe", "decode"]
    assert moe.share is not None and moe.estimated_share is None


def test_collectives_are_of_no_layer_and_their_waiting_is_said_to_be_in_them(tmp_path: Path):
    builder = with_marks(tmp_path / "s", stages=["collective"])
    marked(builder, "collective", -1, 210_010, 210_030, 2)
    marked(builder, "collective", 0, 210_210, 210_220, 2, parent_stage=BY_NAME["device_moe"].id)
    summary = summarise(builder.write())
    (collective,) = [each for each in summary.marks[0].stages if each.stage == "device_collective"]
    assert (collective.count, collective.by_layer, collective.estimated_share) == (2, [], None)
    assert "marks of one rank do not tell it from moving bytes" in shown(summary)


def test_as_table_and_as_json(tmp_path: Path):
    builder = with_marks(tmp_path / "s", absent=3, left_out=2, not_visible=["mlp"])
    session = builder.write()
    text = shown(summarise(session))
    lines = [line.split() for line in text.splitlines()]
    head = lines.index(["Inside", "the", "forward", "pass", "on", "the", "device,", "by", "marks"])
    row = ["worker", "device_attention", "prefill", "2", "1", "2", "200", "µs", "0.2%", "3.2%"]
    assert lines[head + 2][:10] == row
    assert ["worker", "2", "3", "0", "0", "0", "0", "0", "0"] in lines
    assert "No marks around mlp in worker:" in text and "What to do: run the engine uncompiled" in text
    (rank,) = as_dict(summarise(session))["marks"]
    assert (rank["process"], rank["by"], rank["marked_layers"]) == ("worker", "marks", [0, 31])
    assert (rank["marks_per_step"], rank["empty_ns"]) == (12, 1184)
    assert (rank["not_visible"], rank["not_told"]) == (["mlp"], {"left_out": 2, "absent": 3})
    assert [each["layer"] for each in rank["told"][0]["by_layer"]] == [0, 31]
    every = {name for name in MARKS if name not in ("by", "stages", "layers", "per_step", "empty_ns")}
    for key in number_keys(rank) | every | {"not_told"}:
        assert explain(key), key


def test_without_marks_there_is_not_a_word(tmp_path: Path):
    session = recorded(tmp_path / "s").write()
    summary = summarise(session)
    text = shown(summary)
    assert summary.marks == [] and " marks" not in text.lower() and "device_attention" not in text
    assert as_dict(summary)["marks"] == []


@pytest.mark.parametrize(("level", "said"), [("step", "stagetrace ctl level layer"), ("layer", "no step that was")])
def test_marks_that_nobody_read(tmp_path: Path, level: str, said: str):
    builder = recorded(tmp_path / "s", marks=MARKS)
    builder.manifest.level = level
    assert said in shown(summarise(builder.write()))


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ({"by": "nothing", "why": "no Triton", "errors": 0}, "No Triton"),
        ({"by": "nothing", "why": "taken out", "errors": 5}, "the first error is in the engine's log"),
        ({"by": "nothing"}, "it does not say why"),
    ],
)
def test_why_there_are_no_marks(tmp_path: Path, marks: dict[str, Any], said: str):
    text = shown(summarise(recorded(tmp_path / "s", marks=marks).write()))
    assert said.lower() in text.lower() and "There are no marks in worker:" in text
    assert "by marks" not in text


@pytest.mark.parametrize("marks", ["x", None, [], 5])
def test_what_is_no_word_of_marks(tmp_path: Path, marks: Any):
    assert summarise(recorded(tmp_path / "s", marks=marks).write()).marks == []


def test_a_word_of_marks_that_makes_no_sense(tmp_path: Path):
    strange = {"by": 7, "stages": "moe", "layers": [1, "x"], "per_step": -3, "not_visible": {}, "absent": "many"}
    (rank,) = summarise(recorded(tmp_path / "s", marks=strange).write()).marks
    info = rank.info
    assert (info.by, info.stages, info.layers, info.per_step, info.not_visible) == ("7", (), (1,), 0, ())
    assert dict(info.not_told) == {} and rank.stages == []


# What else reads rows of devices


def test_times_of_a_device_are_the_same_with_marks(tmp_path: Path):
    plain = recorded(tmp_path / "plain")
    with_some = recorded(tmp_path / "marks", marks=MARKS)
    for step, at in ((1, 24), (2, 304)):
        marked(with_some, "attention", 0, at * 1000, (at + 5) * 1000, step, a2=99 * MS)
        marked(with_some, "moe", 0, (at + 6) * 1000, (at + 36) * 1000, step)
    one, other = (summarise(each.write()) for each in (plain, with_some))
    assert one.device == other.device
    assert one.light.phases["prefill"].gap == other.light.phases["prefill"].gap


def test_the_gap_counts_what_is_nested_once(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100, **ALONE)
    worker(builder, 1, device="cuda", **ALONE)
    on_thread(builder, 1, 1, 20)
    on_device(builder, "device_forward", 24, 60, 1, thread=9)
    marked(builder, "moe", 0, 30_000, 50_000, 1, thread=9)
    marked(builder, "collective", 0, 40_000, 45_000, 1, thread=9, parent_stage=BY_NAME["device_moe"].id)
    parts = in_parts(builder.write())
    assert parts[Part.KERNEL] == 36 * MS and parts[Part.LAUNCH] == 3 * MS


def test_self_times_of_a_stream_add_up(tmp_path: Path):
    builder = recorded(tmp_path / "s", marks=MARKS)
    # As the assembly makes them: the time of the marks is taken off the forward pass that holds them.
    for row in builder.rows["segments"]:
        if row["stage"] == BY_NAME["device_forward"].id:
            row["self_ns"] -= 10 * MS
    for step, at in ((1, 24), (2, 304)):
        marked(builder, "moe", 3, at * 1000, (at + 10) * 1000, step)
    summary = summarise(builder.write())
    (device,) = [each for each in summary.stages.timelines if each.name == "device"]
    own = {each.stage: each.self_ns for each in device.stages}
    assert own == {"device_forward": 2 * 26 * MS, "device_sample": 2 * 5 * MS, "device_moe": 2 * 10 * MS}
    assert device.accounted_ns == device.envelope_ns
    missed = {*summary.stages.no_rows, *summary.stages.above_level}
    assert {"device_attention", "device_mlp", "device_draft"} <= missed  # as there are rows of others of their kind


def test_a_comparison_says_that_marks_differ(tmp_path: Path):
    paths = (tmp_path / "a", tmp_path / "b")
    for path in paths:
        path.mkdir()
    sides = [Side([sample(make(path / "s").write())]) for make, path in zip((with_marks, built), paths, strict=True)]
    (difference,) = [each for each in compare(*sides).loads if each.what == "marks"]
    assert (difference.a, difference.b) == ("attention, moe in layers 0, 31", "none")
    assert "self time of device_forward" in difference.means
