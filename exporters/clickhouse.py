"""The ClickHouse sink: spans as rows of `otel_traces`, the table of the OpenTelemetry Collector's exporter, by HTTP.

A request is one INSERT of an Arrow stream. The table is made as that exporter makes it (columns, codecs, order), so
that both can write to it; it keeps the hashes of its last thousand inserts, so that one which was sent again, since its
answer got lost, is not there twice. Attributes are text, as the Collector writes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import requests

from .otlp_send import Answer, reason
from .span_sink import BadSettings, SpanSink
from .spans import LINK_LIMIT, SCOPE_NAME, SCOPE_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .sampling import Rules
    from .spans import Span

_LONGEST_WHY = 300
_TIMEOUT_S = 30.0

TABLE = """CREATE TABLE IF NOT EXISTS otel_traces (
    Timestamp DateTime64(9) CODEC(Delta, ZSTD(1)),
    TraceId String CODEC(ZSTD(1)),
    SpanId String CODEC(ZSTD(1)),
    ParentSpanId String CODEC(ZSTD(1)),
    TraceState String CODEC(ZSTD(1)),
    SpanName LowCardinality(String) CODEC(ZSTD(1)),
    SpanKind LowCardinality(String) CODEC(ZSTD(1)),
    ServiceName LowCardinality(String) CODEC(ZSTD(1)),
    ResourceAttributes Map(LowCardinality(String), String) CODEC(ZSTD(1)),
    ScopeName String CODEC(ZSTD(1)),
    ScopeVersion String CODEC(ZSTD(1)),
    SpanAttributes Map(LowCardinality(String), String) CODEC(ZSTD(1)),
    Duration UInt64 CODEC(ZSTD(1)),
    StatusCode LowCardinality(String) CODEC(ZSTD(1)),
    StatusMessage String CODEC(ZSTD(1)),
    Events Nested (
        Timestamp DateTime64(9),
        Name LowCardinality(String),
        Attributes Map(LowCardinality(String), String)
    ) CODEC(ZSTD(1)),
    Links Nested (
        TraceId String,
        SpanId String,
        TraceState String,
        Attributes Map(LowCardinality(String), String)
    ) CODEC(ZSTD(1)),
    INDEX idx_trace_id TraceId TYPE bloom_filter(0.001) GRANULARITY 1,
    INDEX idx_duration Duration TYPE minmax GRANULARITY 1
) ENGINE = MergeTree()
PARTITION BY toDate(Timestamp)
ORDER BY (ServiceName, SpanName, toDateTime(Timestamp))
SETTINGS index_granularity = 8192, ttl_only_drop_parts = 1, non_replicated_deduplication_window = 1000
"""
INSERT = "INSERT INTO otel_traces FORMAT ArrowStream"

_TIME = pa.timestamp("ns")
_MAP = pa.map_(pa.string(), pa.string())
SCHEMA = pa.schema(
    [
        ("Timestamp", _TIME),
        *((name, pa.string()) for name in ("TraceId", "SpanId", "ParentSpanId", "TraceState", "SpanName")),
        *((name, pa.string()) for name in ("SpanKind", "ServiceName")),
        ("ResourceAttributes", _MAP),
        ("ScopeName", pa.string()),
        ("ScopeVersion", pa.string()),
        ("SpanAttributes", _MAP),
        ("Duration", pa.uint64()),
        ("StatusCode", pa.string()),
        ("StatusMessage", pa.string()),
        ("Events.Timestamp", pa.list_(_TIME)),
        ("Events.Name", pa.list_(pa.string())),
        ("Events.Attributes", pa.list_(_MAP)),
        ("Links.TraceId", pa.list_(pa.string())),
        ("Links.SpanId", pa.list_(pa.string())),
        ("Links.TraceState", pa.list_(pa.string())),
        ("Links.Attributes", pa.list_(_MAP)),
    ]
)


def _text(value: Any) -> str:
    """An attribute as the Collector writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _pairs(attributes: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, _text(value)) for key, value in attributes.items()]


def rows(spans: Iterable[Span], resources: Mapping[int | None, Mapping[str, Any]]) -> pa.Table:
    """The spans as rows of otel_traces; `resources` are resource attributes by process. Pure."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    of_process = {process: _pairs(attributes) for process, attributes in resources.items()}
    for span in spans:
        row: tuple[Any, ...] = (
            span.start_time,
            span.context.trace_id.hex(),
            span.context.span_id.hex(),
            "" if span.parent is None else span.parent.span_id.hex(),
            span.trace_state,
            span.name,
            "Server" if span.server else "Internal",
            str(resources[span.process].get("service.name", "")),
            of_process[span.process],
            SCOPE_NAME,
            SCOPE_VERSION,
            _pairs(span.attributes),
            span.end_time - span.start_time,
            "Unset" if span.error is None else "Error",
            span.error or "",
            [event.time_ns for event in span.events],
            [event.name for event in span.events],
            [[] for _ in span.events],
            [link.context.trace_id.hex() for link in span.links],
            [link.context.span_id.hex() for link in span.links],
            ["" for _ in span.links],
            [[("stagetrace.step", str(link.step))] for link in span.links],
        )
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return pa.table(columns, schema=SCHEMA)


def stream(table: pa.Table) -> bytes:
    """A table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found: bytes = sink.getvalue().to_pybytes()
    return found


@dataclass(frozen=True)
class Server:
    """A ClickHouse server's HTTP interface: http[s]://[user[:password]@]host[:port][/database]."""

    url: str

    def __post_init__(self) -> None:
        """Raises BadSettings for what is no such URL."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadSettings(
                f"{self.target!r} is no address of ClickHouse's HTTP interface: http://127.0.0.1:8123/default is one"
            )

    @property
    def _base(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/"

    @property
    def database(self) -> str:
        """The database that the table is in."""
        return urlsplit(self.url).path.strip("/") or "default"

    @property
    def target(self) -> str:
        """As follow.Target."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} (ClickHouse)"

    @property
    def name(self) -> str:
        """As follow.Target."""
        return f"clickhouse-{blake2b(self.target.encode(), digest_size=4).hexdigest()}"

    def request(self, session: requests.Session, query: str, body: bytes = b"", **settings: str) -> requests.Response:
        """Sends a query with the data that it inserts."""
        parts = urlsplit(self.url)
        user = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        given = dict(parse_qsl(parts.query))
        return session.post(
            self._base,
            params={"database": self.database, **given, **settings, "query": query},
            data=body,
            auth=user,
            timeout=_TIMEOUT_S,
            allow_redirects=False,
        )


class HttpInsert:
    """Inserts into a server's otel_traces, which it makes where it is not there."""

    def __init__(self, server: Server):
        self._server = server
        self._session = requests.Session()
        self._made = False

    def send(self, body: bytes) -> Answer:
        """As otlp_send.Sender.send."""
        try:
            if not self._made:
                answer = self._server.request(self._session, TABLE)
                if not answer.ok:
                    return _refusal(answer)
                self._made = True
            token = blake2b(body, digest_size=16).hexdigest()
            answer = self._server.request(self._session, INSERT, body, insert_deduplication_token=token)
            return Answer(True) if answer.ok and not answer.is_redirect else _refusal(answer)
        except requests.RequestException as error:
            why = reason(error)
            found = next((each for sign, each in _REMEDIES.items() if sign in why), "")
            hopeless = bool(found) or isinstance(error, requests.exceptions.SSLError) or "BadStatusLine" in why
            return Answer(False, why[:_LONGEST_WHY], hopeless, found)

    def close(self) -> None:
        """As otlp_send.Sender.close."""
        self._session.close()


_REMEDIES = {
    "CERTIFICATE_VERIFY_FAILED": (
        "nobody who is trusted here has signed its certificate: REQUESTS_CA_BUNDLE names the file of who signed it"
    ),
    "WRONG_VERSION_NUMBER": "that port does not speak TLS: begin the URL with http://, or name the port that does",
}
_REFUSALS = {
    401: "it wants a user and a password: http://USER:PASSWORD@HOST:8123/DATABASE",
    403: "it does not know the user, or the password is another: http://USER:PASSWORD@HOST:8123/DATABASE",
    404: "it has no such database (the path of the URL), or is no ClickHouse",
    516: "it does not know the user, or the password is another: http://USER:PASSWORD@HOST:8123/DATABASE",
}


def _refusal(answer: requests.Response) -> Answer:
    said = " ".join(answer.text.split())[:_LONGEST_WHY]
    # ClickHouse answers 403 or 516 to a wrong password, 404 where the database is not there, and 500 to most else.
    found = _REFUSALS.get(answer.status_code, "")
    return Answer(False, f"it answers {answer.status_code}: {said}", bool(found), found)


class ClickHouseSink(SpanSink):
    """Sends spans to ClickHouse."""

    usual = "Check that it runs, and that the URL is that of its HTTP interface (port 8123 of most)"

    def __init__(self, server: Server, key: bytes, link_limit: int = LINK_LIMIT, rules: Rules | None = None):
        super().__init__(HttpInsert(server), key, link_limit, rules)

    def encode(self, batch: Sequence[Span]) -> bytes:
        """An Arrow stream of rows."""
        return stream(rows(batch, self._of))
