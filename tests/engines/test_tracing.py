"""vLLM with its own tracing on, behind two API servers: its spans and ours are in the same traces."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2 as httpx
import pytest
from backends.receiver import GrpcReceiver, Received
from engines.recording import Recording, record
from quickstart.servers import VLLM, Engine

if TYPE_CHECKING:
    import pandas as pd

pytestmark = pytest.mark.matrix
TRACE_ID, PARENT_ID = "6bf92f3577b34da6a3ce929d0e0e4736", "20f067aa0ba902b7"
REQUESTS = 24


class Served(Engine):
    """vLLM by `vllm serve`, which alone starts several API servers."""

    def command(self, model: Path, port: int, *arguments: str) -> list[str]:
        """The server's command line."""
        python, _, _, *rest = super().command(model, port, *arguments)
        return [python, str(Path(__file__).with_name("vllm_serve.py")), *rest]


@dataclass
class Recorded:
    """What the tests of this file look at."""

    recording: Recording
    answers: list[dict[str, str]]  # those of the even numbers came with a traceparent
    spans: list[Received]

    @property
    def requests(self) -> pd.DataFrame:
        return self.recording.frames()["requests"].set_index("external_id")

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.span.name == name]


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory) -> Recorded:  # type: ignore[no-untyped-def]
    directory = tmp_path_factory.mktemp("tracing")
    engine = Served(**{field.name: getattr(VLLM, field.name) for field in fields(VLLM)})
    with GrpcReceiver() as receiver:
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_INSECURE": "true",
            "OTEL_BSP_SCHEDULE_DELAY": "100",  # ms; vLLM's exporter sends nothing at its process's end
        }
        arguments = ("--enforce-eager", "--api-server-count", "2", "--otlp-traces-endpoint", receiver.endpoint)
        with record(model, directory, *arguments, env=env, run=("--no-report",), engine=engine) as recording:
            answers = asyncio.run(_load(recording.server.base_url, recording.server.model))
            time.sleep(2)
        spans = receiver.received()
    return Recorded(recording, answers, spans)


async def _load(base_url: str, model: str) -> list[dict[str, str]]:
    """Each on a connection of its own, so that both API servers get some."""

    async def one(number: int) -> dict[str, str]:
        headers = {"traceparent": f"00-{TRACE_ID[:-2]}{number:02x}-{PARENT_ID}-01"} if number % 2 == 0 else {}
        body = {"model": model, "prompt": f"number {number}", "max_tokens": 5, "ignore_eos": True, "n": 1 + number % 3}
        async with httpx.AsyncClient(timeout=120) as client:
            response = await client.post(f"{base_url}/completions", json=body, headers=headers)
        response.raise_for_status()
        answer: dict[str, str] = response.json()
        return answer

    return [answer for at in range(0, REQUESTS, 8) for answer in await asyncio.gather(*map(one, range(at, at + 8)))]


def test_requests_of_both_front_ends(recorded: Recorded) -> None:
    manifest = recorded.recording.manifest
    assert manifest.counts["accounting_conflict"] == 0
    assert not any(process.errors for process in manifest.processes)
    roles = [process.role for process in manifest.processes]
    assert sorted(roles) == ["engine_core", "front_end", "front_end", "worker"]
    requests = recorded.requests
    assert len(requests) == sum(len(answer["choices"]) for answer in recorded.answers)
    assert set(requests["status"]) == {"finished"}
    assert requests[["arrival_ns", "first_sent_ns", "last_sent_ns"]].notna().all().all()
    segments = recorded.recording.frames()["segments"]
    fronts = {process.key for process in manifest.processes if process.role == "front_end"}
    detokenized = segments[segments["process"].isin(fronts)]
    assert detokenized["process"].nunique() == 2, "one API server got all requests"


def test_the_callers_trace_is_continued(recorded: Recorded) -> None:
    requests = recorded.requests
    for number, answer in enumerate(recorded.answers):
        rows = requests.loc[[f"{answer['id']}-0"]]
        given = f"{TRACE_ID[:-2]}{number:02x}"
        if number % 2 == 0:
            assert set(rows["trace_id"]) == {given}
            assert set(rows["parent_span_id"]) == {PARENT_ID}
        else:
            assert rows["trace_id"].nunique() == 1
            assert given not in set(rows["trace_id"])
            assert rows["parent_span_id"].isna().all()


def test_vllms_spans_share_the_traces(recorded: Recorded) -> None:
    """A span of vLLM's for each answer: beside ours under the caller's, or under ours where there was no caller's."""
    theirs, ours = recorded.named("llm_request"), recorded.named("request")
    assert len(theirs) == len(ours) == len(recorded.requests)
    by_id = {span.id: span for span in ours}
    requests = recorded.requests
    for span in theirs:
        rows = requests.loc[[f"{span.attributes['gen_ai.request.id']}"]]
        assert set(rows["trace_id"]) == {span.span.trace_id.hex()}
        parent = (span.span.trace_id, span.span.parent_span_id)
        if rows["parent_span_id"].isna().all():
            assert parent in by_id
        else:
            assert span.span.parent_span_id.hex() == PARENT_ID
