"""Tests of the speed of light of a session: rates, ceilings, and what is said where something is missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner
from unit.configs import LLAMA_405B, MIXTRAL_8X7B
from unit.sessions import INSTANCE, SessionBuilder
from unit.test_report import shown

from stagetrace.analysis.batch import Batch
from stagetrace.analysis.ceilings import Ceilings, least_times
from stagetrace.analysis.hardware import match
from stagetrace.analysis.load import load
from stagetrace.analysis.model_config import ConfigError, describe
from stagetrace.analysis.operations import step_work
from stagetrace.analysis.report import as_dict, summarise
from stagetrace.analysis.sharding import Sharding
from stagetrace.analysis.speed_of_light import DATA_SHEET, window_width
from stagetrace.analysis.step_light import light_over_time, request_light, step_light, with_light
from stagetrace.cli.report import report
from stagetrace.exporters.session import TABLES
from stagetrace.exporters.spans import STEP_LIGHT

if TYPE_CHECKING:
    from pathlib import Path

H100 = "NVIDIA H100 80GB HBM3"
PREFILL, DECODE = [(1000, 1000), (24, 500)], [(1, 900)] * 7


def sums(phase: str, requests: list[tuple[int, int]]) -> dict[str, int]:
    batch = getattr(Batch.of_requests(**{phase: requests}), phase)
    return {f"{phase}_{name}": int(getattr(batch, name)) for name in ("requests", "tokens", "context", "q_q", "q_kv")}


def built(path: Path, config: dict[str, Any] | None = MIXTRAL_8X7B, **info: Any) -> SessionBuilder:
    """A prefill step and two decode steps that overlap, of a model whose config lies beside the session."""
    model = path.parent / "model"
    model.mkdir(exist_ok=True)
    if config is not None:
        (model / "config.json").write_text(json.dumps(config))
    builder = SessionBuilder(path)
    builder.process(info={"engine": "vllm", "model_path": str(model), "dtype": "torch.bfloat16", **info})
    builder.step(1, 0, 200_000_000, "prefill", **sums("prefill", PREFILL))
    builder.step(2, 200_000_000, 240_000_000, "decode", **sums("decode", DECODE))
    builder.step(3, 210_000_000, 280_000_000, "decode", **sums("decode", DECODE))
    builder.step(4, 300_000_000, 900_000_000, "decode", status="incomplete", **sums("decode", DECODE))
    return builder


def test_work_is_that_of_the_steps(tmp_path: Path):
    light = summarise(built(tmp_path / "s").write()).light
    model = describe(MIXTRAL_8X7B)
    prefill, decode = (step_work(model, Batch.of_requests(*each)) for each in ((PREFILL,), ((), DECODE)))
    assert light.model == "mixtral" and light.config == str(tmp_path / "model" / "config.json")
    assert light.phases["prefill"].operations == float(prefill.operations())
    assert light.phases["decode"].operations == pytest.approx(2 * float(decode.operations()))
    assert light.phases["decode"].bytes == pytest.approx(2 * float(decode.bytes()))
    # The second decode step's own time begins when the first ended.
    assert light.phases["decode"].time_ns == 40_000_000 + 40_000_000
    assert light.phases["decode"].bytes_per_s == pytest.approx(2 * float(decode.bytes()) / 0.08)
    whole = sum(each.operations for each in light.phases.values())
    assert sum(each.operations for each in light.stages.values()) == pytest.approx(whole)
    assert light.stages["attention"].time_ns is None and light.stages["attention"].share(DATA_SHEET) is None


def test_without_a_known_device_there_are_rates_and_a_way_on(tmp_path: Path):
    summary = summarise(built(tmp_path / "s", device="cpu").write())
    assert summary.light.ceilings == {}
    assert (
        summary.light.phases["prefill"].share(DATA_SHEET) is None and summary.light.phases["prefill"].operations_per_s
    )
    text = shown(summary)
    assert "The device (cpu) is not in the table of data sheets. What it can do is not known" in text
    assert "Speed of light by kind of step, of one rank\n" in text


def test_with_a_known_device_there_is_a_share(tmp_path: Path):
    summary = summarise(built(tmp_path / "s", device_name=H100).write())
    decode = summary.light.phases["decode"]
    least = decode.roofs[DATA_SHEET]
    assert least.whole_ns == least.memory_ns == pytest.approx(decode.bytes / 3.35e12 * 1e9)  # decode is bound by memory
    assert decode.share(DATA_SHEET) == decode.mbu(DATA_SHEET) == pytest.approx(decode.bytes / 3.35e12 / 0.08)
    assert decode.mfu(DATA_SHEET) == pytest.approx(decode.operations / 989.5e12 / 0.08)
    assert decode.bus(DATA_SHEET) == 0
    prefill = summary.light.phases["prefill"]
    assert prefill.roofs[DATA_SHEET].whole_ns == pytest.approx(
        max(prefill.operations / 989.5e12, prefill.bytes / 3.35e12) * 1e9
    )
    assert "ceilings: NVIDIA, NVIDIA H100 Tensor Core GPU Datasheet, 2024" in shown(summary)


def test_shards_are_those_of_the_engine(tmp_path: Path):
    info = {"tensor_parallel": 4, "pipeline_parallel": 2, "device_name": H100}
    light = summarise(built(tmp_path / "s", **info).write()).light
    model = describe(MIXTRAL_8X7B)
    batch = Batch.of_requests(PREFILL)
    parts = [step_work(model, batch, Sharding.vllm(4, 2), stage=stage) for stage in (0, 1)]
    prefill = light.phases["prefill"]
    assert prefill.operations == pytest.approx(sum(float(part.operations()) for part in parts) / 2)
    assert prefill.bus_bytes == pytest.approx(sum(float(part.bus_bytes()) for part in parts) / 2)
    device = match(H100).device
    assert device is not None
    wholes = [least_times(part.works, part.collectives, Ceilings.of(device)).whole for part in parts]
    assert None not in wholes
    assert prefill.roofs[DATA_SHEET].whole_ns == pytest.approx(sum(map(float, wholes)) / 2 * 1e9)  # type: ignore[arg-type]
    assert any("2 pipeline stages" in note for note in light.notes)


def test_times_of_stages_are_those_of_one_rank(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100, tensor_parallel=2)
    for rank in (1, 2):
        at = {"process": rank, "thread": rank}
        for step in (2, 3):
            builder.segment("attention", 200_000_000, 203_000_000, step, **at)
            builder.segment("forward", 200_000_000, 220_000_000, step, self_ns=17_000_000, **at)
        builder.segment("attention", 0, 77_000_000, 4, **at)  # of a step that is not complete
    light = summarise(builder.write()).light
    assert light.stages["attention"].time_ns == 6_000_000 and light.stages["forward"].time_ns == 34_000_000
    assert light.stages["logits"].time_ns is None and light.stages["attention"].count == 2
    assert light.stages["collective"].bus_bytes > 0 and light.stages["collective"].operations == 0


def test_times_of_stages_of_several_engines_and_pipeline_stages(tmp_path: Path):
    """The work of a stage is over the time that it took: neither engines nor pipeline stages make it look faster."""

    def share(path: Path, engines: int, ranks: int) -> float | None:
        builder = built(path, device_name=H100, pipeline_parallel=ranks)
        builder.rows["steps"] = []
        for engine in range(engines):
            at = {"instance": INSTANCE + engine}
            builder.step(1, 0, 200_000_000, "prefill", **at, **sums("prefill", PREFILL))
            for rank in range(ranks):
                where = {"process": 10 * engine + rank, "thread": rank}
                end = 100_000_000 // ranks
                builder.segment("attention", 0, end, 1, **at, **where)
                builder.segment("forward", 0, 2 * end, 1, self_ns=end, **at, **where)
        return summarise(builder.write()).light.stages["attention"].share(DATA_SHEET)

    one = share(tmp_path / "a", 1, 1)
    assert one == pytest.approx(share(tmp_path / "b", 2, 1)) == pytest.approx(share(tmp_path / "c", 1, 2))


def test_stages_are_of_the_steps_that_have_layers(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100)
    builder.segment("attention", 210_000_000, 215_000_000, 2)  # and step 3, as long, was recorded at level step
    builder.segment("forward", 205_000_000, 225_000_000, 2, self_ns=15_000_000)
    builder.segment("attention", 10_000_000, 15_000_000, 1, partial=True)  # switched on in the middle of it
    light = summarise(builder.write()).light
    decode = step_work(describe(MIXTRAL_8X7B), Batch.of_requests(decode=DECODE), Sharding.vllm())
    attention = light.stages["attention"]
    assert (attention.count, attention.time_ns) == (1, 5_000_000)
    assert attention.operations == float(decode.operations("attention"))


def test_what_proposes_drafts_is_said_to_be_left_out(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100)
    assert not any("draft" in note for note in summarise(builder.write()).light.notes)
    builder = built(tmp_path / "t", device_name=H100)
    builder.step(5, 900_000_000, 950_000_000, "decode", **sums("decode", DECODE), draft_tokens=3)
    assert any("what proposes draft tokens is not counted" in note for note in summarise(builder.write()).light.notes)


def test_over_time(tmp_path: Path):
    """Steps are of the window that they end in; windows add up to all."""
    builder = built(tmp_path / "s", device_name=H100)
    builder.step(5, 3_000_000_000, 3_500_000_000, "decode", **sums("decode", DECODE))
    session = builder.write()
    light = summarise(session).light
    assert [(each.begin_ns, each.width_ns, each.done.count) for each in light.windows] == [
        (0, 1_000_000_000, 3),
        (3_000_000_000, 1_000_000_000, 1),
    ]
    assert [each.busy for each in light.windows] == [0.28, 0.5]
    assert sum(each.done.operations for each in light.windows) == pytest.approx(
        sum(each.operations for each in light.phases.values())
    )
    assert light.windows[1].done.mbu(DATA_SHEET) == pytest.approx(light.windows[1].done.bytes / 3.35e12 / 0.5)
    assert "Speed of light over time, windows of 1.00 s" in shown(summarise(session))
    frames = load(session)
    found = light_over_time(session, frames.manifest, frames["steps"], frames["experts"])
    assert found["mbu"].tolist() == [each.done.mbu(DATA_SHEET) for each in light.windows]
    assert found["busy"].tolist() == [0.28, 0.5]
    finer = light_over_time(session, frames.manifest, frames["steps"], frames["experts"], 0.1)
    assert finer["steps"].sum() == 4 and (finer["width_ns"] == 100_000_000).all()
    rows = as_dict(summarise(session))["speed_of_light"]["over_time"]
    assert [row["against"][DATA_SHEET]["mbu"] for row in rows] == found["mbu"].tolist()


@pytest.mark.parametrize(("span_s", "width_s"), [(0.1, 1), (12, 1), (12.1, 2), (3600, 300), (86400 * 30, 86400 * 3)])
def test_windows_are_few(span_s: float, width_s: int):
    steps = pd.DataFrame({"begin_ns": [5], "end_ns": [5 + round(span_s * 1e9)]})
    assert window_width(steps) == width_s * 10**9


def test_steps_of_a_commit_know_the_end_of_the_one_before(tmp_path: Path):
    session = built(tmp_path / "s", device_name=H100).write()
    tables = {name: session.read_table(name) for name in TABLES}
    enrich, manifest, steps = with_light(session), session.read_manifest(), tables["steps"]
    parts = [enrich({**tables, "steps": steps.slice(at, count)}, manifest) for at, count in ((0, 2), (2, 2))]
    own = [value for part in parts for value in part["steps"]["own_ns"].to_pylist()]
    assert own == [200e6, 40e6, 40e6, 600e6]


def test_a_missing_config_is_said(tmp_path: Path):
    summary = summarise(built(tmp_path / "s", config=None).write())
    assert summary.light.phases == {}
    assert "No speed of light: the model's config.json cannot be read (No such file or directory)" in shown(summary)
    assert "Name it with --model-config." in shown(summary)


def test_a_session_without_a_model_has_no_section(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.process()
    builder.step(1, 0, 10)
    assert "light" not in shown(summarise(builder.write())).lower()


def test_a_config_can_be_named(tmp_path: Path):
    session = built(tmp_path / "s").write()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(LLAMA_405B))
    assert summarise(session, model_config=other).light.model == "llama"
    with pytest.raises(ConfigError, match="nowhere"):
        summarise(session, model_config=tmp_path / "nowhere")
    app = typer.Typer()
    app.command()(report)
    found = CliRunner().invoke(app, [str(session.path), "--json", "--model-config", str(other)])
    assert json.loads(found.output)["speed_of_light"]["model"] == "llama"
    broken = CliRunner().invoke(app, [str(session.path), "--model-config", str(tmp_path / "nowhere")])
    assert broken.exit_code == 2 and "config.json cannot be read" in broken.output
    assert (
        json.loads(json.dumps(as_dict(summarise(session))))["speed_of_light"]["by_stage"]["expert_compute"]["steps"]
        == 3
    )


def test_steps_without_sums_are_nothing(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100)
    builder.rows["steps"] = []
    builder.step(9, 0, 1_000)
    light = summarise(builder.write()).light
    assert light.phases["decode"].operations == 0 and light.phases["decode"].share(DATA_SHEET) == 0


def test_arithmetic_that_a_device_lacks_is_done_in_a_wider_one():
    a100 = match("NVIDIA A100-SXM4-80GB").device
    assert a100 is not None
    ceilings = Ceilings.of(a100)
    assert ceilings.peak("fp8") == ceilings.peak("bf16") == 312e12
    assert ceilings.peak("fp4") == 312e12 and ceilings.peak("int4") == 1248e12
    assert Ceilings("", {"fp16": 1.0}, None, None).peak("bf16") == 1.0
    assert Ceilings("", {}, None, None).peak("bf16") is None


def test_a_missing_ceiling_gives_no_time():
    work = step_work(describe(MIXTRAL_8X7B), Batch.of_requests(decode=DECODE), Sharding.vllm(2))
    whole = Ceilings("", {"bf16": 1e12}, 1e12, 1e11)
    assert least_times(work.works, work.collectives, whole).whole is not None
    for missing in (
        Ceilings("", {}, 1e12, 1e11),
        Ceilings("", {"bf16": 1e12}, None, 1e11),
        Ceilings("", {"bf16": 1.0}, 1.0, None),
    ):
        found = least_times(work.works, work.collectives, missing)
        assert found.whole is None and [found.compute, found.memory, found.link].count(None) == 1
    assert least_times(work.works, [], Ceilings("", {"bf16": 1e12}, 1e12, None)).whole is not None


def test_a_measured_bandwidth_is_that_of_the_working_set():
    measured = Ceilings("", {}, 2.0, None, ((1_000.0, 16.0), (1_000_000.0, 2.0)))
    found = measured.bandwidth_at(np.array([0.0, 1.0, 1_000.0, 10**4.5, 1e6, 1e9]))
    assert found is not None
    assert np.asarray(found).tolist() == pytest.approx([16, 16, 16, 9, 2, 2])


def test_one_request_alone_is_beside_what_requests_took(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100)
    for number, output in enumerate((11, 11, 1)):
        builder.request(
            number,
            90_000_000,
            prompt_tokens=100,
            cached_tokens=20,
            output_tokens=output,
            arrival_ns=0,
            first_token_ns=50_000_000,
            last_token_ns=50_000_000 + (output - 1) * 1_000_000,
        )
    found = summarise(builder.write()).light.requests
    assert found is not None and found.count == 3
    model = describe(MIXTRAL_8X7B)
    prefill = step_work(model, Batch.of_requests([(80, 100)]), Sharding.vllm())
    assert found.ttft_ns == 50_000_000 and found.tpot_ns == 1_000_000
    assert found.least_ttft_ns == pytest.approx(
        max(float(prefill.operations()) / 989.5e12, float(prefill.bytes()) / 3.35e12) * 1e9
    )
    assert found.least_tpot_ns is not None and found.least_tpot_ns < found.least_ttft_ns
    session = builder.session
    frames = load(session)
    each = request_light(session, frames.manifest, frames["requests"])
    assert each["least_ttft_ns"].tolist() == pytest.approx([found.least_ttft_ns] * 3)
    assert each["least_tpot_ns"].isna().tolist() == [False, False, True]


def test_one_request_on_a_pipeline(tmp_path: Path):
    """Chunks of a prompt are in all stages at once, a token is in one stage after the other."""
    times = {"arrival_ns": 0, "first_token_ns": 50_000_000, "last_token_ns": 60_000_000}
    tokens = {"prompt_tokens": 4000, "output_tokens": 11}
    least = []
    for name, ranks in (("a", 1), ("b", 2)):
        builder = built(tmp_path / name, device_name=H100, pipeline_parallel=ranks)
        builder.request(1, 90_000_000, **tokens, **times)
        light = summarise(builder.write()).light.requests
        assert light is not None and light.least_ttft_ns and light.least_tpot_ns
        least.append((light.least_ttft_ns, light.least_tpot_ns))
    (alone_first, alone_each), (first, each) = least
    assert first == pytest.approx(alone_first / 2, rel=0.02) and each == pytest.approx(alone_each, rel=0.02)


def test_experts_that_were_touched_are_taken_where_they_were_recorded(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100)
    for layer, counts in ((0, [3, 1, 0, 0, 0, 0, 0, 0]), (1, [1, 1, 1, 1, 0, 0, 0, 0])):
        builder.row("experts", process=1, instance=INSTANCE, step=2, rank=0, layer=layer, tokens=2, counts=counts)
    light = summarise(builder.write()).light
    model = describe(MIXTRAL_8X7B)
    recorded, expected = (
        float(step_work(model, Batch.of_requests(decode=DECODE, distinct_experts=touched)).bytes())
        for touched in (3.0, None)
    )
    assert light.phases["decode"].bytes == pytest.approx(recorded + expected)
    assert any("not recorded of 66.7% of the steps" in note for note in light.notes)


def test_shards_of_sglang(tmp_path: Path):
    plain, attention = Sharding.sglang(8, 2, expert=4), Sharding.sglang(8, attention_data=4, expert=8)
    assert (plain.tensor, plain.pipeline, plain.data, plain.expert, plain.expert_tensor) == (8, 2, 1, 4, 2)
    assert (attention.tensor, attention.data, attention.expert, attention.expert_tensor) == (2, 4, 8, 1)
    info = {"engine": "sglang", "device_name": H100, "tensor_parallel": 4, "attention_data_parallel": 3}
    assert "No speed of light: the recorded ranks do not fit" in shown(summarise(built(tmp_path / "s", **info).write()))


def test_steps_have_it_one_by_one_in_frames_and_spans(tmp_path: Path):
    session = built(tmp_path / "s", device_name=H100).write()
    frames = load(session)
    found = step_light(session, frames.manifest, frames["steps"], frames["experts"])
    assert tuple(found.columns) == STEP_LIGHT and found.index.equals(frames["steps"].index)
    work = step_work(describe(MIXTRAL_8X7B), Batch.of_requests(PREFILL), Sharding.vllm())
    first = found.iloc[0]
    assert first["operations"] == float(work.operations()) and first["moved_bytes"] == float(work.bytes())
    assert first["mfu"] == pytest.approx(first["operations"] / 989.5e12 / 0.2)
    assert first["mbu"] == pytest.approx(first["moved_bytes"] / 3.35e12 / 0.2)
    assert first["light_share"] == max(first["mfu"], first["mbu"])
    tables = {name: session.read_table(name) for name in TABLES}
    lit = with_light(session)(tables, frames.manifest)
    assert lit["steps"].to_pandas()["light_share"].tolist() == found["light_share"].tolist()


def test_steps_of_an_unknown_model_stay_as_they_are(tmp_path: Path):
    session = built(tmp_path / "s", config=None).write()
    tables = {name: session.read_table(name) for name in TABLES}
    assert with_light(session)(tables, session.read_manifest())["steps"].equals(tables["steps"])
    cpu = built(tmp_path / "t", device="cpu").write()
    frames = load(cpu)
    known = step_light(cpu, frames.manifest, frames["steps"], frames["experts"])
    assert tuple(known.columns) == STEP_LIGHT[:3]
