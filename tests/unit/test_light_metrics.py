"""Tests of the speed of light as metrics: sums by kind of step and roof, shares of the last minute, least latencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from unit.test_gap import ALONE, MS, on_thread, worker
from unit.test_speed_of_light import H100, built

from stagetrace.analysis.report import summarise
from stagetrace.analysis.speed_of_light import DATA_SHEET
from stagetrace.analysis.step_light import with_light
from stagetrace.exporters.light_metrics import BOUNDS_S, WINDOW_NS, LightMetrics
from stagetrace.exporters.metrics import metrics_of
from stagetrace.exporters.session import TABLES, Export

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.sdk.metrics.export import Metric

    from stagetrace.exporters.session import Session


def recorded(path: Path) -> Session:
    builder = built(path, device_name=H100, **ALONE)
    worker(builder, 1, **ALONE)
    on_thread(builder, 1, 1, 20)
    for step, begin in ((2, 201), (3, 241)):
        on_thread(builder, 1, step, begin)
    for number, (output, status) in enumerate(((11, "finished"), (1, "finished"), (7, "aborted"))):
        times = {"arrival_ns": 0, "first_token_ns": 50 * MS, "last_token_ns": 60 * MS}
        builder.request(number, 90 * MS, prompt_tokens=100, output_tokens=output, status=status, **times)
    return builder.write()


def lit(session: Session) -> dict[str, pa.Table]:
    tables = {name: session.read_table(name) for name in TABLES}
    return dict(with_light(session)(tables, session.read_manifest()))


def by_name(metrics: list[Metric]) -> dict[str, Any]:
    return {metric.name: metric.data for metric in metrics}


def points(data: Any, *attributes: str) -> dict[tuple[str, ...], float]:
    return {tuple(point.attributes[name] for name in attributes): point.value for point in data.data_points}


def test_metrics_are_what_the_report_says(tmp_path: Path):
    session = recorded(tmp_path / "s")
    metrics = LightMetrics()
    metrics.add(lit(session))
    found, light = by_name(metrics.metrics(5)), summarise(session).light
    time = points(found["stagetrace.step.time"], "stagetrace.phase")
    least = points(found["stagetrace.step.least_time"], "stagetrace.phase", "stagetrace.roof")
    gaps = points(found["stagetrace.step.gap"], "stagetrace.phase", "stagetrace.part")
    assert set(time) == {("prefill",), ("decode",)}
    for name, done in light.phases.items():
        assert done.time_ns is not None and done.gap is not None
        roofs = done.roofs[DATA_SHEET]
        assert time[name,] == pytest.approx(done.time_ns / 1e9)
        assert least[name, "compute"] == pytest.approx((roofs.compute_ns or 0) / 1e9)
        assert least[name, "memory"] == pytest.approx((roofs.memory_ns or 0) / 1e9)
        assert least[name, "all"] == pytest.approx((roofs.whole_ns or 0) / 1e9) and least[name, "link"] == 0
        assert gaps[name, "host"] == pytest.approx(done.gap.host_ns / 1e9)
        assert gaps[name, "kernel"] == pytest.approx(done.gap.kernel_ns / 1e9)
        assert (name, "launch") not in gaps
        shares = ((each, points(found[f"stagetrace.step.{each}"], "stagetrace.phase")) for each in ("mfu", "mbu"))
        assert {each: share[name,] for each, share in shares} == {
            "mfu": pytest.approx(done.mfu(DATA_SHEET)),
            "mbu": pytest.approx(done.mbu(DATA_SHEET)),
        }
        assert points(found["stagetrace.step.operations"], "stagetrace.phase")[name,] == done.operations
    assert found["stagetrace.step.time"].is_monotonic and not found["stagetrace.step.gap"].is_monotonic
    (first,) = found["stagetrace.request.least_time_to_first_token"].data_points
    (each,) = found["stagetrace.request.least_time_per_output_token"].data_points
    assert (first.count, each.count) == (2, 1)  # that finished; with a second token
    assert light.requests is not None and light.requests.least_tpot_ns is not None
    assert each.sum == pytest.approx(light.requests.least_tpot_ns / 1e9)
    assert sum(first.bucket_counts) == 2 and len(first.bucket_counts) == len(BOUNDS_S) + 1
    place = next(i for i, bound in enumerate((*BOUNDS_S, float("inf"))) if each.sum <= bound)
    assert each.bucket_counts[place] == 1


def test_sums_go_on_and_shares_are_of_the_last_minute(tmp_path: Path):
    tables = lit(recorded(tmp_path / "s"))
    metrics = LightMetrics()
    metrics.add(tables)
    once = points(by_name(metrics.metrics(1))["stagetrace.step.time"], "stagetrace.phase")
    steps = tables["steps"]
    for name in ("begin_ns", "end_ns"):
        later = pa.array([each.as_py() + 2 * WINDOW_NS for each in steps[name]], pa.int64())
        steps = steps.set_column(steps.column_names.index(name), name, later)
    decode = pa.array([phase == "decode" for phase in steps["phase"].to_pylist()])
    metrics.add({**tables, "steps": steps.filter(decode)})
    found = by_name(metrics.metrics(2))
    twice = points(found["stagetrace.step.time"], "stagetrace.phase")
    assert twice == {("prefill",): once["prefill",], ("decode",): pytest.approx(2 * once["decode",])}
    assert set(points(found["stagetrace.step.mfu"], "stagetrace.phase")) == {("decode",)}


def test_what_is_not_known_has_no_metric(tmp_path: Path):
    unknown, cpu = built(tmp_path / "s", config=None).write(), built(tmp_path / "t", device="cpu").write()
    metrics = LightMetrics()
    metrics.add({name: unknown.read_table(name) for name in TABLES})
    assert metrics.metrics(1) == []
    metrics.add(lit(cpu))  # the model is known, and no ceiling
    assert set(by_name(metrics.metrics(1))) == {
        *("stagetrace.step.time", "stagetrace.step.operations", "stagetrace.step.moved_bytes"),
        "stagetrace.step.link_bytes",
    }


def test_they_go_out_with_the_counts(tmp_path: Path):
    session = recorded(tmp_path / "s")
    metrics = LightMetrics()
    metrics.add(lit(session))
    data = metrics_of(session.read_manifest(), Export("a"), 9, metrics.metrics(9))
    names = [each.name for each in data.resource_metrics[0].scope_metrics[0].metrics]
    assert {"stagetrace.slots", "stagetrace.step.mfu"} <= set(names) and len(names) == len(set(names))
