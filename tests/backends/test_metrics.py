"""Metrics by OTLP to a real receiver: of real engines' sessions, by the variables of the specification."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from backends.exported import export_otlp
from backends.receiver import GrpcReceiver, HttpReceiver, Receiver, values

from stagetrace.exporters.metrics import MetricsSink
from stagetrace.exporters.otel_settings import Reading, destination, reading
from stagetrace.exporters.parts import END
from stagetrace.exporters.session import TABLES, Export, Manifest, Session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

DELTA = 1  # AGGREGATION_TEMPORALITY_DELTA
_Series = dict[tuple[str, tuple[Any, ...]], Any]


def points(request: ExportMetricsServiceRequest, kind: str) -> _Series:
    """Of every metric of a kind its points, by its name and their attributes."""
    return {
        (metric.name, tuple(sorted(values(point.attributes).items()))): point
        for group in request.resource_metrics
        for scope in group.scope_metrics
        for metric in scope.metrics
        if metric.HasField(kind)
        for point in getattr(metric, kind).data_points
    }


def commits(session: Session) -> Iterator[tuple[dict[str, Any], Manifest]]:
    manifest = session.read_manifest()
    for number in (*range(1, manifest.derived + 1), END):
        yield {name: session.read_table(name, numbers=(number, number)) for name in TABLES}, manifest


def send_by_commits(session: Session, environ: dict[str, str], how: Reading, receiver: Receiver) -> None:
    """The metrics after each commit; after the second the backend takes nothing for a while."""
    wanted = destination(environ, "metrics")
    assert wanted is not None
    sink = MetricsSink(wanted, session.identity.key, how)
    for number, (tables, manifest) in enumerate(commits(session)):
        sink.add(tables, manifest)
        receiver.metrics_status = 400 if number == 1 else 0
        sink._next_s, sink._refused = 0.0, False  # as if its pauses were over
        sink.send(manifest, Export("here", commit=manifest.derived))
    sink.shutdown()


def test_exemplars_lead_to_spans_that_the_same_backend_has(recording: Session, receiver: Receiver) -> None:
    send_by_commits(recording, dict(os.environ), Reading(), receiver)
    spans = {span.context for span in export_otlp(recording, os.environ)}
    histograms = points(receiver.metrics[-1], "histogram")
    found = {name: [each for point in (histograms[name],) for each in point.exemplars] for name in histograms}
    named = {name for (name, _), exemplars in found.items() if exemplars}
    assert {"gen_ai.server.time_to_first_token", "gen_ai.server.request.duration", "stagetrace.step.duration"} <= named
    ids = {(span.trace_id, span.span_id) for span in spans}
    assert all((each.trace_id, each.span_id) in ids for exemplars in found.values() for each in exemplars)


@pytest.mark.parametrize("kind", [GrpcReceiver, HttpReceiver])
def test_what_was_added_adds_up_to_the_totals(recordings: dict[str, Session], kind: type[Receiver]) -> None:
    sums: dict[str, list[_Series]] = {}
    counts: dict[str, list[_Series]] = {}
    for preference in ("cumulative", "delta"):
        how = reading({"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": preference})
        with kind() as receiver:
            environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": kind.protocol}
            send_by_commits(recordings["vllm"], environ, how, receiver)
            assert len(receiver.metrics) > 3
            sums[preference] = [points(request, "sum") for request in receiver.metrics]
            counts[preference] = [points(request, "histogram") for request in receiver.metrics]
            temporality = {
                getattr(metric, kind).aggregation_temporality
                for request in receiver.metrics
                for group in request.resource_metrics
                for metric in group.scope_metrics[0].metrics
                for kind in ("sum", "histogram")
                if metric.HasField(kind) and (kind == "histogram" or metric.sum.is_monotonic)
            }
            assert temporality == {DELTA if preference == "delta" else 2}
    for series, total in sums["cumulative"][-1].items():
        added = [of[series] for of in sums["delta"] if series in of]
        assert sum(each.as_int or each.as_double for each in added) == pytest.approx(total.as_int or total.as_double)
    for series, total in counts["cumulative"][-1].items():
        parts = [of[series] for of in counts["delta"] if series in of]
        assert [sum(each) for each in zip(*(part.bucket_counts for part in parts), strict=True)] == total.bucket_counts
        assert sum(part.count for part in parts) == total.count
        assert sum(part.sum for part in parts) == pytest.approx(total.sum)
        for before, after in pairwise(parts):
            assert after.start_time_unix_nano == before.time_unix_nano and not after.HasField("min")
        exemplars = [(each.time_unix_nano, each.span_id) for part in parts for each in part.exemplars]
        assert len(set(exemplars)) == len(exemplars), "none twice"


def test_a_process_goes_on_from_what_the_one_before_was_confirmed(recording: Session) -> None:
    """With "delta": what is counted since the session began is told once, whoever tells it; a refusal tells nothing."""
    how = reading({"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta"})
    manifest = recording.read_manifest()
    with HttpReceiver() as receiver:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": HttpReceiver.protocol,
        }
        wanted = destination(environ, "metrics")
        assert wanted is not None
        recording.write_export("there", Export("there"))
        for process, sent in enumerate((100, 130, 170)):
            state = recording.read_exports()["there"]
            state.sent = sent
            sink = MetricsSink(wanted, recording.identity.key, how)
            receiver.metrics_status = 400 if process == 1 else 0
            sink.send(manifest, state)
            sink.shutdown()
            recording.write_export("there", state)
        told = [points(request, "sum") for request in receiver.metrics]
    series = [of for of in told[0] if of[0] == "stagetrace.spans" and "sent" in str(of)]
    assert [of[series[0]].as_int for of in told][-1] == 70 and told[0][series[0]].as_int == 100
    slots = [of for of in told[0] if of[0] == "stagetrace.slots"]
    assert slots and any(told[0][of].as_int for of in slots)
    assert all(told[-1][of].as_int == 0 for of in slots), "told by the process before"
    assert told[-1][series[0]].start_time_unix_nano == told[0][series[0]].time_unix_nano


def test_the_variables_mean_what_they_say() -> None:
    assert reading({}) == Reading(10.0, False)
    assert reading({"OTEL_METRIC_EXPORT_INTERVAL": "2500"}).every_s == 2.5
    assert reading({"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "LowMemory"}).deltas
    for environ in (
        {"OTEL_METRIC_EXPORT_INTERVAL": "soon"},
        {"OTEL_METRIC_EXPORT_INTERVAL": "0"},
        {"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "gamma"},
    ):
        with pytest.raises(ValueError, match=next(iter(environ))):
            reading(environ)


def test_a_request_may_take_what_the_variable_says() -> None:
    for given, seconds in (("", 10.0), ("2.5", 2.5), ("25", 25.0), ("10000", 60.0)):
        wanted = destination({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_TIMEOUT": given})
        assert wanted is not None and wanted.timeout_s == seconds
    for given in ("soon", "0", "-1", "nan"):
        wanted = destination({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_TIMEOUT": given})
        assert wanted is not None
        with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_TIMEOUT"):
            wanted.timeout_s  # noqa: B018
