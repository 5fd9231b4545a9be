"""Arize Phoenix, a real trace store with a UI: what it gives back is what was sent, span by span.

It is 600 MB and starts slowly, so these tests are `matrix`: `make phoenix-env`, then `make test-all`.
"""

from __future__ import annotations

import os
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from backends.tables import KEY, serving
from backends.test_rotel import free_ports

from stagetrace.exporters.otel_settings import destination
from stagetrace.exporters.otlp import OtlpSink
from stagetrace.exporters.span_sink import batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stagetrace.exporters.spans import Span

pytestmark = pytest.mark.matrix
PYTHON = Path(__file__).parents[2] / ".venv-phoenix" / "bin" / "python"
PROJECT = "stagetrace"
START_S, VISIBLE_S = 180.0, 120.0


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The endpoints of a Phoenix by protocol."""
    assert PYTHON.exists(), "these tests need Phoenix: make phoenix-env"
    folder = tmp_path_factory.mktemp("phoenix")
    http, grpc = free_ports(2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OTEL_"))} | {
        "PHOENIX_PORT": str(http),
        "PHOENIX_GRPC_PORT": str(grpc),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_WORKING_DIR": str(folder),
        "PHOENIX_TELEMETRY_ENABLED": "false",
        "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
        "PHOENIX_DISABLE_AGENT_ASSISTANT": "true",
        "PHOENIX_ENABLE_MCP_SERVER": "false",
    }
    with open(folder / "log", "wb") as log:
        program = [PYTHON, "-m", "phoenix.server.main", "serve"]
        process = subprocess.Popen(program, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{http}"
        deadline = time.monotonic() + START_S
        while not answers(url):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield {"grpc": f"http://127.0.0.1:{grpc}", "http/protobuf": url}
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/healthz", timeout=2).ok
    except requests.RequestException:
        return False


def given_back(url: str, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """The spans of the project with these ids, once they are there."""
    deadline = time.monotonic() + VISIBLE_S
    while True:
        answer = requests.get(f"{url}/v1/projects/{PROJECT}/spans", params={"limit": "1000"}, timeout=30)
        spans = answer.json()["data"] if answer.ok else []
        found = {each["context"]["span_id"]: each for each in spans if each["context"]["span_id"] in wanted}
        if set(found) == wanted:
            return found
        assert time.monotonic() < deadline, f"{len(found)} of {len(wanted)} spans: {answer.text[:500]}"
        time.sleep(0.5)


def micros(text: str) -> int:
    moment = datetime.fromisoformat(text)
    return round(moment.timestamp()) * 1_000_000 + moment.microsecond - (moment.microsecond >= 500_000) * 1_000_000


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_what_phoenix_gives_back_is_what_was_sent(
    phoenix: dict[str, str], protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", f"openinference.project.name={PROJECT}")
    wanted = destination({"OTEL_EXPORTER_OTLP_ENDPOINT": phoenix[protocol], "OTEL_EXPORTER_OTLP_PROTOCOL": protocol})
    assert wanted is not None
    session = serving()
    # With ids of their own: Phoenix keeps the first span of an id, whatever project it is in.
    sink = OtlpSink.to(wanted, KEY + protocol[:4].encode(), timeout_s=30)
    spans: dict[str, Span] = {
        span.context.span_id.hex(): span for span in sink.spans(session.tables, session.manifest).spans
    }
    for batch in batches(list(spans.values())):
        assert sink.send(batch), sink.why
    sink.shutdown()
    for span_id, each in given_back(phoenix["http/protobuf"], set(spans)).items():
        span = spans[span_id]
        assert each["context"]["trace_id"] == span.context.trace_id.hex()
        assert each["parent_id"] == (None if span.parent is None else span.parent.span_id.hex())
        assert each["name"] == span.name
        assert each["status_code"] == ("UNSET" if span.error is None else "ERROR")
        assert abs(micros(each["start_time"]) - span.start_time // 1000) <= 1, "it keeps microseconds"
        assert abs(micros(each["end_time"]) - span.end_time // 1000) <= 1
        assert len(each["events"]) == len(span.events)
        for name in ("stagetrace.stage", "stagetrace.step", "stagetrace.phase", "gen_ai.usage.input_tokens"):
            value = each["attributes"].get(name)
            assert name not in span.attributes or value == span.attributes[name], (name, each["attributes"])
