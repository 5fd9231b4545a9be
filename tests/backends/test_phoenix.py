"""Arize Phoenix, a real trace store with a UI: what it gives back is what was sent, span by span.

It is 600 MB and starts slowly, so these tests are `matrix`: `make phoenix-env`, then `make test-all`.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from backends.exported import export_otlp
from backends.test_rotel import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stagetrace.exporters.session import Session

pytestmark = pytest.mark.matrix
PYTHON = Path(__file__).parents[2] / ".venv-phoenix" / "bin" / "python"
PROJECT = "stagetrace"
START_S, VISIBLE_S = 180.0, 300.0


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The endpoints of a Phoenix by protocol."""
    with running(tmp_path_factory.mktemp("phoenix")) as endpoints:
        yield endpoints


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """The endpoints of a Phoenix by protocol, while it runs."""
    assert PYTHON.exists(), "these tests need Phoenix: make phoenix-env"
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
        found: dict[str, dict[str, Any]] = {}
        cursor = None
        while True:
            given = {"limit": "1000", **({"cursor": cursor} if cursor else {})}
            answer = requests.get(f"{url}/v1/projects/{PROJECT}/spans", params=given, timeout=30)
            page = answer.json() if answer.ok else {"data": []}
            found |= {each["context"]["span_id"]: each for each in page["data"]}
            cursor = page.get("next_cursor")
            if not cursor:
                break
        if wanted <= set(found):
            return {span_id: found[span_id] for span_id in wanted}
        assert time.monotonic() < deadline, f"{len(wanted & set(found))} of {len(wanted)} spans: {answer.text[:500]}"
        time.sleep(1)


def micros(text: str) -> int:
    moment = datetime.fromisoformat(text)
    return round(moment.timestamp()) * 1_000_000 + moment.microsecond - (moment.microsecond >= 500_000) * 1_000_000


@pytest.mark.parametrize(("engine", "protocol"), [("vllm", "grpc"), ("sglang", "http/protobuf")])
def test_what_phoenix_gives_back_is_what_was_sent(
    phoenix: dict[str, str],
    recordings: dict[str, Session],
    engine: str,
    protocol: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", f"openinference.project.name={PROJECT}")
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": phoenix[protocol], "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    spans = {span.context.span_id.hex(): span for span in export_otlp(recordings[engine], environ, timeout_s=30)}
    for span_id, each in given_back(phoenix["http/protobuf"], set(spans)).items():
        span = spans[span_id]
        assert each["context"]["trace_id"] == span.context.trace_id.hex()
        assert each["parent_id"] == (None if span.parent is None else span.parent.span_id.hex())
        assert each["name"] == span.name
        assert each["status_code"] == ("UNSET" if span.error is None else "ERROR")
        assert abs(micros(each["start_time"]) - span.start_time // 1000) <= 1, "it keeps microseconds"
        assert abs(micros(each["end_time"]) - span.end_time // 1000) <= 1
        assert [event["name"] for event in each["events"]] == [event.name for event in span.events]
        for name, value in span.attributes.items():
            kept = list(value) if isinstance(value, tuple) else value
            assert each["attributes"].get(name) == kept, (name, each["attributes"])
