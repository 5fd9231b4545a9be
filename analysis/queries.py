"""Questions to a session in SQL, written once: DuckDB answers them over Parquet, ClickHouse over `otel_traces`.

Both have the same views, `steps`, `segments` and `requests`; what differs is a quantile, which is exact and
interpolates linearly in both, as in the tables of a report. Only plain SQL stands in between.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from stagetrace.exporters.session import TABLES
from stagetrace.instrument.stages import STAGES, STEP_COMPOSITION, Kind

if TYPE_CHECKING:
    from stagetrace.exporters.session import Session

# By name: what it tells, and the query. {p99:x} is the 99th percentile of x.
QUERIES: dict[str, tuple[str, str]] = {
    "latencies": (
        "requests that finished: how many, and percentiles of time to first token and end to end, ns",
        "SELECT count(*) AS requests, {p50:ttft_ns} AS ttft_p50, {p99:ttft_ns} AS ttft_p99, {p50:e2e_ns} AS e2e_p50,"
        " {p99:e2e_ns} AS e2e_p99 FROM requests WHERE status = 'finished'",
    ),
    "states": (
        "where a request's time goes: mean of each state, ns",
        "SELECT avg(queue_ns) AS queue, avg(prefill_ns) AS prefill, avg(decode_ns) AS decode, avg(output_ns) AS output"
        " FROM requests WHERE status = 'finished'",
    ),
    "steps": (
        "complete steps by kind: how many, percentiles of their duration, what no stage covers, ns",
        "SELECT phase, count(*) AS steps, {p50:duration_ns} AS p50, {p95:duration_ns} AS p95, {p99:duration_ns} AS p99,"
        " sum(unattributed_ns) AS unattributed FROM steps WHERE status = 'complete' GROUP BY phase ORDER BY phase",
    ),
    "stages": (
        "stages by their self time: how often, in sum, percentiles, ns",
        "SELECT stage, count(*) AS calls, sum(self_ns) AS self_time, {p50:self_ns} AS p50, {p99:self_ns} AS p99"
        " FROM segments GROUP BY stage ORDER BY self_time DESC, stage",
    ),
    "phases": (
        "self time of each stage by kind of step, ns",
        "SELECT stage, phase, count(*) AS calls, sum(self_ns) AS self_time FROM segments"
        " GROUP BY stage, phase ORDER BY stage, phase",
    ),
    "slowest": (
        "the ten slowest requests, with their traces",
        "SELECT trace_id, request_id, e2e_ns, queue_ns, prefill_ns, decode_ns FROM requests"
        " WHERE e2e_ns IS NOT NULL ORDER BY e2e_ns DESC, request_id LIMIT 10",
    ),
}

_QUANTILE = re.compile(r"\{p(\d+):(\w+)\}")
_STEP_WORDS = ("unattributed_ns", *(attribute.name for attribute in STEP_COMPOSITION))
_OF_STEPS = [stage.name for stage in STAGES if stage.kind is Kind.SEGMENT or stage.name == "rank_step"]
_STATES = ("queue_ns", "prefill_ns", "decode_ns", "output_ns", "preempted_ns")


def quantile(percent: int, column: str, dialect: str) -> str:
    """An exact percentile with linear interpolation. ClickHouse's plain `quantile` samples: it is off by percents."""
    share = f"{percent / 100:g}"
    return f"quantile_cont({column}, {share})" if dialect == "duckdb" else f"quantileExactInclusive({share})({column})"


def sql(name: str, dialect: str) -> str:
    """The query of that name for `duckdb` or `clickhouse`. Raises KeyError for one that there is not."""
    return _QUANTILE.sub(lambda found: quantile(int(found[1]), found[2], dialect), QUERIES[name][1])


def duckdb_views(session: Session) -> list[str]:
    """Statements that make the views over a session's Parquet files."""

    def table(name: str) -> str:
        files = ", ".join("'{}'".format(str(path).replace("'", "''")) for path in session.table_files(name))
        if files:
            return f"read_parquet([{files}], union_by_name = true)"
        columns = ", ".join(f"NULL::{_DUCKDB.get(str(field.type), 'BIGINT')} AS {field.name}" for field in TABLES[name])
        return f"(SELECT {columns} WHERE false)"

    names = " ".join(f"WHEN {stage.id} THEN '{stage.name}'" for stage in STAGES if stage.name in _OF_STEPS)
    numbers = ", ".join(str(stage.id) for stage in STAGES if stage.name in _OF_STEPS)
    return [
        f"CREATE VIEW steps AS SELECT instance, step, phase, status, end_ns - begin_ns AS duration_ns,"
        f" {', '.join(_STEP_WORDS)} FROM {table('steps')}",
        f"CREATE VIEW segments AS SELECT CASE stage {names} END AS stage, phase, step,"
        f" end_ns - begin_ns AS duration_ns, self_ns FROM {table('segments')} WHERE step IS NOT NULL"
        f" AND instance IS NOT NULL AND stage IN ({numbers})",
        f"CREATE VIEW requests AS SELECT request_id, trace_id, status, prompt_tokens, output_tokens,"
        f" first_output_ns - arrival_ns AS ttft_ns, last_output_ns - arrival_ns AS e2e_ns, {', '.join(_STATES)}"
        f" FROM {table('requests')} WHERE (trace_flags & 1) = 1",
    ]


_DUCKDB = {"string": "VARCHAR", "bool": "BOOLEAN"}


def clickhouse_views() -> list[str]:
    """Statements that make the views over `otel_traces`, whether the Collector or stagetrace writes it."""

    def number(key: str, name: str) -> str:
        return f"toInt64OrNull(SpanAttributes['stagetrace.{key}']) AS {name}"

    def seconds(key: str, name: str) -> str:
        return f"toInt64(round(toFloat64OrNull(SpanAttributes['{key}']) * 1e9)) AS {name}"

    words = ", ".join(number(name, name) for name in _STEP_WORDS)
    states = ", ".join(number(name, name) for name in _STATES)
    stage = "SpanAttributes['stagetrace.stage']"
    of_steps = "', '".join(_OF_STEPS)
    return [
        f"CREATE VIEW steps AS SELECT SpanAttributes['stagetrace.engine_instance'] AS instance,"
        f" {number('step', 'step')}, SpanAttributes['stagetrace.phase'] AS phase,"
        f" SpanAttributes['stagetrace.status'] AS status,"
        f" toInt64(Duration) AS duration_ns, {words} FROM otel_traces WHERE {stage} = 'step'",
        f"CREATE VIEW segments AS SELECT {stage} AS stage, SpanAttributes['stagetrace.phase'] AS phase,"
        f" {number('step', 'step')}, toInt64(Duration) AS duration_ns, {number('self_ns', 'self_ns')} FROM otel_traces"
        f" WHERE {stage} IN ('{of_steps}') AND mapContains(SpanAttributes, 'stagetrace.step')",
        f"CREATE VIEW requests AS SELECT SpanAttributes['stagetrace.request_id'] AS request_id, TraceId AS trace_id,"
        f" SpanAttributes['stagetrace.status'] AS status,"
        f" toInt64OrNull(SpanAttributes['gen_ai.usage.input_tokens']) AS prompt_tokens,"
        f" toInt64OrNull(SpanAttributes['gen_ai.usage.output_tokens']) AS output_tokens,"
        f" {seconds('gen_ai.latency.time_to_first_token', 'ttft_ns')}, {seconds('gen_ai.latency.e2e', 'e2e_ns')},"
        f" {states} FROM otel_traces WHERE {stage} = 'request'",
    ]


def ask(session: Session, name: str) -> Any:
    """A frame with the answer to one of QUERIES, by DuckDB over a session's Parquet files.

    Needs the package duckdb (`pip install stagetrace[sql]`). Raises KeyError for a query that there is not.
    """
    import duckdb

    connection = duckdb.connect()
    try:
        for statement in duckdb_views(session):
            connection.execute(statement)
        return connection.execute(sql(name, "duckdb")).df()
    finally:
        connection.close()
