"""ClickHouse: rows that arrive in otel_traces, and the same answers from it, from DuckDB over Parquet, and from pandas.

ClickHouse is chDB in a process of its own, behind as much of the HTTP interface as the sink uses (chdb_server.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import requests
from backends.authority import Authority
from backends.exported import export, export_otlp
from backends.receiver import HttpReceiver
from backends.tables import MS, TRACE_ID, Builder, serving
from backends.test_rotel import agent
from unit.commands import commands_in, wait_for

from stagetrace.analysis.queries import QUERIES, ask, clickhouse_views, quantile, sql
from stagetrace.exporters.clickhouse import TABLE, ClickHouseSink, Server
from stagetrace.exporters.session import Manifest, Session
from stagetrace.exporters.span_sink import BadSettings
from stagetrace.instrument import ids
from stagetrace.instrument.identity import claim_identity
from stagetrace.instrument.stages import BY_ID, BY_NAME, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).parents[2]
PYTHON = CHECKOUT / ".venv-clickhouse" / "bin" / "python"


class ClickHouse:
    """A server over chDB."""

    def __init__(self, directory: Path):
        assert PYTHON.exists(), "these tests need chDB: make clickhouse-env"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        program = [PYTHON, Path(__file__).with_name("chdb_server.py"), directory]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        port = self.process.stdout.readline().strip()
        assert port, "chDB did not start: its message is above"
        self.url = f"http://127.0.0.1:{port}/default"

    def query(self, query: str) -> list[dict[str, Any]]:
        answer = requests.post(self.url.rpartition("/")[0], params={"query": query}, timeout=60)
        assert answer.ok, answer.text
        return [json.loads(line) for line in answer.text.splitlines()]

    def stop(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def clickhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    running = ClickHouse(tmp_path_factory.mktemp("clickhouse"))
    running.query(TABLE)
    for view in clickhouse_views():
        running.query(view)
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _empty(clickhouse: ClickHouse) -> None:
    clickhouse.query("TRUNCATE TABLE otel_traces")


def written(path: Path, tables: Any, manifest: Manifest) -> Session:
    session = Session(path, claim_identity(path))
    for name, table in tables.items():
        session.write_table(name, table, 1)
    manifest.derived, manifest.complete, manifest.session = 1, True, session.identity.session
    session.write_manifest(manifest)
    return session


def sent(session: Session, clickhouse: ClickHouse) -> int:
    """Exports the session whole; how many spans it has."""
    server = Server(clickhouse.url)
    return len(export(session, ClickHouseSink(server, session.identity.key), server))


def test_rows_say_what_the_spans_say(tmp_path: Path, clickhouse: ClickHouse) -> None:
    whole = serving()
    session = written(tmp_path / "session", whole.tables, whole.manifest)
    count = sent(session, clickhouse)
    rows = clickhouse.query("SELECT *, toUnixTimestamp64Nano(Timestamp) AS at FROM otel_traces")
    assert len(rows) == count == len({row["SpanId"] for row in rows})
    by_id = {row["SpanId"]: row for row in rows}
    step = by_id[ids.step_span_id(session.identity.key, whole.instance, 1).hex()]
    assert (step["SpanName"], step["SpanKind"], step["StatusCode"], int(step["Duration"])) == (
        "step prefill", "Internal", "Unset", 20 * MS,
    )  # fmt: skip
    assert int(step["at"]) == whole.wall + 10 * MS
    assert step["SpanAttributes"]["stagetrace.prefill_tokens"] == "400"
    assert step["ResourceAttributes"]["process.pid"] == "4001" and step["ServiceName"] == "vllm"
    request = by_id[ids.request_span_id(session.identity.key, whole.traced).hex()]
    assert (request["TraceId"], request["SpanKind"]) == (TRACE_ID, "Server")
    assert request["SpanAttributes"]["gen_ai.response.finish_reasons"] == '["stop"]'
    assert request["Events.Name"][0] == "stagetrace.first_output" and len(request["Events.Timestamp"]) == 4
    assert request["Links.SpanId"] == [
        ids.step_span_id(session.identity.key, whole.instance, number).hex() for number in (1, 2, 3, 4)
    ]
    assert request["Links.Attributes"][2] == {"stagetrace.step": "3"}
    parent = by_id[by_id[ids.step_span_id(session.identity.key, whole.instance, 1).hex()]["SpanId"]]
    assert parent["ParentSpanId"] == ""


def text(value: Any) -> str:
    """An attribute as the Collector's exporter writes it into a map of strings."""
    return value if isinstance(value, str) else json.dumps(value)


def texts(attributes: Any) -> dict[str, str]:
    return {name: text(value) for name, value in attributes.items()}


def test_rows_of_a_real_engines_session_are_its_spans(recording: Session, clickhouse: ClickHouse) -> None:
    server = Server(clickhouse.url)
    sink = ClickHouseSink(server, recording.identity.key)
    spans = {span.context.span_id.hex(): span for span in export(recording, sink, server)}
    rows = clickhouse.query("SELECT *, toUnixTimestamp64Nano(Timestamp) AS at FROM otel_traces")
    assert len(rows) == len(spans) > 800
    for row in rows:
        span = spans[row["SpanId"]]
        assert row["TraceId"] == span.context.trace_id.hex()
        assert row["ParentSpanId"] == ("" if span.parent is None else span.parent.span_id.hex())
        assert (row["SpanName"], row["TraceState"]) == (span.name, span.trace_state)
        assert row["SpanKind"] == ("Server" if span.server else "Internal")
        assert (int(row["at"]), int(row["at"]) + int(row["Duration"])) == (span.start_time, span.end_time)
        assert (row["StatusCode"], row["StatusMessage"]) == (
            ("Unset", "") if span.error is None else ("Error", span.error)
        )
        assert row["SpanAttributes"] == texts(span.attributes)
        assert row["ResourceAttributes"] == texts(sink._of[span.process])
        assert row["ServiceName"] == row["ResourceAttributes"]["service.name"]
        assert row["Events.Name"] == [event.name for event in span.events]
        assert row["Links.SpanId"] == [link.context.span_id.hex() for link in span.links]
        assert row["Links.Attributes"] == [{"stagetrace.step": str(link.step)} for link in span.links]


def in_words_of_none(row: dict[str, Any]) -> dict[str, Any]:
    """A row with numbers as such, and arrays by what is in them: collectors write their own texts of both."""
    attributes = dict(row["SpanAttributes"])
    for name, value in attributes.items():
        if name == "gen_ai.response.finish_reasons":
            attributes[name] = re.findall(r"length|stop|abort|error", value)
        elif re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", value):
            attributes[name] = float(value)
    return {**row, "SpanAttributes": attributes}


def test_rows_that_a_real_collector_writes_are_the_same(
    recording: Session, clickhouse: ClickHouse, tmp_path: Path
) -> None:
    everything = "SELECT * FROM otel_traces ORDER BY TraceId, SpanId"
    sent(recording, clickhouse)
    direct = clickhouse.query(everything)
    clickhouse.query("TRUNCATE TABLE otel_traces")
    with agent(
        tmp_path / "log",
        exporter="clickhouse",
        clickhouse_exporter_endpoint=clickhouse.url.rpartition("/")[0],
        clickhouse_exporter_database="default",
        clickhouse_exporter_compression="none",
    ) as endpoints:
        spans = export_otlp(recording, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoints["grpc"]})
        count = "SELECT count() AS n FROM otel_traces"
        wait_for(lambda: clickhouse.query(count) == [{"n": len(spans)}])
    assert [*map(in_words_of_none, clickhouse.query(everything))] == [*map(in_words_of_none, direct)]
    check_answers(recording, clickhouse)


def test_what_is_sent_again_is_there_once(tmp_path: Path, clickhouse: ClickHouse) -> None:
    whole = serving()
    session = written(tmp_path / "session", whole.tables, whole.manifest)
    count = sent(session, clickhouse)
    sent(session, clickhouse)
    assert clickhouse.query("SELECT count() AS n FROM otel_traces") == [{"n": count}]


def big(seed: int = 3) -> Builder:
    """A few thousand rows with times that repeat, so that percentiles fall between values and on them."""
    build, chance, at = Builder(), np.random.default_rng(seed), 0
    for step in range(400):
        prefill = int(chance.integers(0, 3) == 0)
        took = int(chance.integers(1, 200)) * 10_000 + int(chance.integers(0, 3))
        of = (7, step, "prefill" if prefill else "decode")
        status = "complete" if step % 50 else "incomplete"
        build.step(7, step, at, at + took, prefill_tokens=prefill * 9, decode_tokens=1 - prefill, status=status,
                   unattributed_ns=took // 100)  # fmt: skip
        outer = build.segment("execute", 11, at, at + took, of=of)
        build.segment("forward", 11, at + 1, at + took - 1, of=of, parent=outer, tokens=4)
        build.segment("sample", 11, at + took - 1, at + took, of=of, parent=outer)
        at += took
    for number in range(150):
        begin = number * MS
        first, last = (int(chance.integers(1, 50)) * MS + 7 for _ in range(2))
        build.request(
            f"r{number:03d}", arrival_ns=begin, first_output_ns=begin + first, last_output_ns=begin + first + last,
            end_ns=begin + first + last, status="finished" if number % 10 else "aborted", queue_ns=first // 2,
            prefill_ns=first // 3, decode_ns=last, output_ns=None if number % 7 else 3, output_tokens=2,
            trace_flags=int(number % 13 != 0),
        )  # fmt: skip
    return build


def by_pandas(session: Session, name: str) -> pd.DataFrame:
    """The same answers, by hand."""
    tables = {table: session.read_table(table).to_pandas() for table in ("requests", "steps", "segments")}
    requests_ = tables["requests"][tables["requests"]["trace_flags"] & 1 == 1]
    finished = requests_[requests_["status"] == "finished"]
    ttft, e2e = (frame["last_output_ns"] - frame["arrival_ns"] for frame in (finished, requests_))
    ttft = finished["first_output_ns"] - finished["arrival_ns"]
    if name == "latencies":
        whole = finished["last_output_ns"] - finished["arrival_ns"]
        values = [len(finished), *(each.quantile(p) for each in (ttft, whole) for p in (0.5, 0.99))]
        return pd.DataFrame([values])
    if name == "states":
        return pd.DataFrame([[finished[f"{state}_ns"].mean() for state in ("queue", "prefill", "decode", "output")]])
    if name == "slowest":
        top = requests_.assign(e2e_ns=e2e).sort_values(["e2e_ns", "request_id"], ascending=[False, True]).head(10)
        return top[["trace_id", "request_id", "e2e_ns", "queue_ns", "prefill_ns", "decode_ns"]]
    if name == "steps":
        steps = tables["steps"][tables["steps"]["status"] == "complete"]
        took = (steps["end_ns"] - steps["begin_ns"]).groupby(steps["phase"])
        frame = pd.DataFrame({"n": took.count(), **{p: took.quantile(p) for p in (0.5, 0.95, 0.99)}})
        return frame.assign(u=steps.groupby("phase")["unattributed_ns"].sum()).reset_index()
    of_steps = tables["segments"].dropna(subset=["instance", "step"])
    kinds = of_steps["stage"].map(lambda number: BY_ID[number].kind)
    of_steps = of_steps[(kinds == Kind.SEGMENT) | (of_steps["stage"] == BY_NAME["rank_step"].id)]
    segments = of_steps.assign(stage=of_steps["stage"].map(lambda number: BY_ID[number].name))
    if name == "phases":
        found = segments.groupby(["stage", "phase"])["self_ns"].agg(["count", "sum"]).reset_index()
        return found.sort_values(["stage", "phase"])
    own = segments.groupby("stage")["self_ns"]
    frame = pd.DataFrame({"n": own.count(), "sum": own.sum(), "p50": own.quantile(0.5), "p99": own.quantile(0.99)})
    return frame.reset_index().sort_values(["sum", "stage"], ascending=[False, True])


def check_answers(session: Session, clickhouse: ClickHouse) -> None:
    for name in QUERIES:
        duck = [tuple(row) for row in ask(session, name).itertuples(index=False)]
        house = [tuple(row.values()) for row in clickhouse.query(sql(name, "clickhouse"))]
        panda = [tuple(row) for row in by_pandas(session, name).itertuples(index=False)]
        assert len(duck) == len(house) == len(panda) > 0, name
        for rows in zip(duck, house, panda, strict=True):
            for values in zip(*rows, strict=True):
                if isinstance(values[0], str):
                    assert len(set(values)) == 1, (name, values)
                else:
                    numbers = [float("nan") if pd.isna(value) else float(value) for value in values]
                    assert numbers == pytest.approx([numbers[0]] * 3, rel=1e-12, nan_ok=True), (name, values)


def test_each_query_has_one_answer(tmp_path: Path, clickhouse: ClickHouse) -> None:
    session = written(tmp_path / "session", big().tables(), Manifest(anchors=[(0, 10**18)]))
    sent(session, clickhouse)
    check_answers(session, clickhouse)


def test_each_query_has_one_answer_of_a_real_engines_session(recording: Session, clickhouse: ClickHouse) -> None:
    sent(recording, clickhouse)
    check_answers(recording, clickhouse)


def test_an_empty_session_has_empty_answers(tmp_path: Path) -> None:
    session = written(tmp_path / "session", {}, Manifest(anchors=[(0, 1)]))
    assert len(ask(session, "steps")) == 0 and len(ask(session, "stages")) == 0


def test_quantiles_of_clickhouse_are_the_exact_ones() -> None:
    assert quantile(99, "x", "clickhouse") == "quantileExactInclusive(0.99)(x)"
    assert quantile(50, "x", "duckdb") == "quantile_cont(x, 0.5)"


# What is wrong


@pytest.mark.parametrize("url", ["", "localhost:8123", "tcp://a:9000", "http://"])
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(BadSettings, match="8123"):
        Server(url)


def test_a_password_is_not_shown() -> None:
    server = Server("https://me:geheim@host:8443/traces?secure=1")
    assert server.target == "https://host:8443/traces (ClickHouse)" and server.database == "traces"
    assert "geheim" not in server.name


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("the database", "no such database"),
        ("the password", "USER:PASSWORD@HOST"),
        ("nobody signed it", "REQUESTS_CA_BUNDLE"),
        ("no TLS", "begin the URL with http://"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(tmp_path: Path, wrong: str, says: str) -> None:
    certificate = Authority(tmp_path / "authority").sign("server", "IP:127.0.0.1")
    with HttpReceiver(certificate=certificate) as secure, HttpReceiver() as plain:
        plain.status = 404 if wrong == "the database" else 516  # as ClickHouse answers
        url = {"nobody signed it": secure.endpoint, "no TLS": f"https://127.0.0.1:{plain.port}"}.get(
            wrong, plain.endpoint
        )
        sink = ClickHouseSink(Server(f"{url}/default"), b"key")
        build = Builder()
        build.step(7, 1, 1 * MS, 2 * MS, decode_tokens=1)
        assert not sink.send(sink.spans(build.tables(), Manifest(anchors=[(0, 10**18)])).spans)
        assert sink.hopeless and says in sink.remedy, sink.why
        sink.shutdown()


def test_the_command_sends_and_says_what_is_wrong(tmp_path: Path, clickhouse: ClickHouse) -> None:
    whole = serving()
    session = written(tmp_path / "session", whole.tables, whole.manifest)
    command = [sys.executable, "-m", "stagetrace.cli.main", "export", session.path, "--to", "clickhouse"]
    with commands_in(tmp_path) as commands:
        commands.environment["NO_PROXY"] = "127.0.0.1"
        wrong = commands.start(*command)
        assert b"http://127.0.0.1:8123/default" in wrong.communicate(timeout=60)[1] and wrong.returncode == 2
        commands.environment["STAGETRACE_CLICKHOUSE_URL"] = "http://127.0.0.1:1/default"
        away = commands.start(*command, "--patience", "0.5")
        out, err = away.communicate(timeout=60)
        assert away.returncode == 1 and b"taken nothing" in err and b"1 commits wait" in out
        commands.environment["STAGETRACE_CLICKHOUSE_URL"] = clickhouse.url
        done = commands.start(*command)
        out, err = done.communicate(timeout=60)
        assert done.returncode == 0, err
    (row,) = clickhouse.query("SELECT count() AS n FROM otel_traces")
    assert f"{row['n']} spans sent to {clickhouse.url} (ClickHouse)".encode() in out
