"""Tests of the hooks on the HTTP server: what a request's bytes say of it, and requests that no engine has seen."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from unit.rings import opened, read_all

from stagetrace.adapters.http import EXCHANGE, HTTP_POINTS
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.instrument.around import wrap
from stagetrace.instrument.hooks import Hook

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.instrument.recorder import Recorder

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def hooked(recorder: Recorder) -> Any:
    """A class with uvicorn's two functions, and the hooks on them."""

    class Cycle:
        disconnected = False

        def __init__(self, path: str, method: str, headers: list[tuple[bytes, bytes]]):
            self.scope = {"path": path, "method": method, "headers": headers}

        async def run_asgi(self, app: Any) -> None:
            await app(self)

        async def send(self, message: dict[str, Any]) -> None:
            pass

    run_asgi, send = (Hook(HTTP_POINTS[index], index, recorder) for index in (0, 2))
    cycle: Any = Cycle
    cycle.run_asgi = wrap(cycle.run_asgi, run_asgi.point.handler(run_asgi), run_asgi)
    cycle.send = wrap(cycle.send, send.point.handler(send), send)
    return cycle


def answered(directory: Path, status: int, path: str, method: str, *, asked: bool = False) -> list[dict[str, Any]]:
    """The rows of the requests after one HTTP request was answered so; `asked`: an engine has seen it."""

    async def app(cycle: Any) -> None:
        if asked:
            EXCHANGE.get().handles.append(7)  # type: ignore[union-attr]
        await cycle.send({"type": "http.response.start", "status": status, "headers": []})
        await cycle.send({"type": "http.response.body", "body": b"{", "more_body": True})
        await cycle.send({"type": "http.response.body", "body": b"}"})

    with opened(directory) as (recorder, reader):
        cycle = hooked(recorder)(path, method, [(b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())])
        asyncio.run(cycle.run_asgi(app))
        assert not any(recorder.errors)
        assembler = Assembler(b"key")
        assembler.add(read_all(reader))
        rows: list[dict[str, Any]] = assembler.finish()["requests"].to_pylist()
    return rows


@pytest.mark.parametrize("status", [400, 404, 413, 429, 500, 503])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions/", "/generate"])
def test_a_request_that_was_refused(tmp_path: Path, status: int, path: str) -> None:
    (row,) = answered(tmp_path, status, path, "POST")
    assert (row["status"], row["finish"], row["refused"]) == ("error", "error", status)
    assert (row["trace_id"], row["parent_span_id"]) == (TRACE, SPAN)
    assert row["last_sent_ns"] == row["end_ns"] >= row["arrival_ns"]
    assert row["tokenize_ns"] == row["end_ns"] - row["arrival_ns"]


@pytest.mark.parametrize(
    ("status", "path", "method"),
    [
        (200, "/v1/completions", "POST"),
        (401, "/v1/completions", "POST"),
        (405, "/v1/completions", "GET"),
        (404, "/v1/completions", "GET"),
        (404, "/metrics", "GET"),
        (404, "/v1/load_lora_adapter", "POST"),
        (404, "/", "POST"),
    ],
)
def test_what_asks_no_model_or_may_not_is_no_request(tmp_path: Path, status: int, path: str, method: str) -> None:
    assert answered(tmp_path, status, path, method) == []


def test_what_an_engine_has_seen_is_not_refused(tmp_path: Path) -> None:
    """Its row comes of the engine's records; here there are none but the bytes'."""
    assert all(row["refused"] is None for row in answered(tmp_path, 500, "/v1/completions", "POST", asked=True))
