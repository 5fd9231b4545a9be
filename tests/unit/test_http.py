"""Tests of the hooks on the HTTP server: what a request's bytes say of it, and requests that no engine has seen."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest
from unit.rings import opened, read_all

from stagetrace.adapters.http import EXCHANGE, HTTP_POINTS, unsent
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.instrument.around import wrap
from stagetrace.instrument.hooks import Hook
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.instrument.recorder import Recorder

TOKENIZE = header_word(RecordType.STATE, BY_NAME["request_tokenize"].id)
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def hooked(recorder: Recorder) -> Any:
    """A class with uvicorn's two functions, and the hooks on them."""

    class Cycle:
        disconnected = False

        def __init__(self, path: str, method: str, headers: list[tuple[bytes, bytes]], transport: Any = None):
            self.scope = {"path": path, "method": method, "headers": headers}
            self.transport = transport

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
            recorder.state(TOKENIZE, 1, 7, 0, 0, 0, 0, 1)
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


# What the socket still has at the end


async def kept_back(size: int, reads: int, limit: int) -> tuple[int, int]:
    """What `unsent` says of a real connection after so many bytes were written, and so many read by a client."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, limit)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=server)
        transport.write(b"x" * size)
        while reads:
            reads -= len(await asyncio.to_thread(client.recv, reads))
        found = unsent(transport)
        transport.abort()
    return found


def test_what_a_client_has_read_is_not_unsent() -> None:
    assert asyncio.run(kept_back(10_000, 10_000, 1 << 20)) == (1, 0)


def test_what_a_client_does_not_read_is_unsent() -> None:
    """Its own kernel holds a little; the rest waits in this one and in the transport."""
    size = 8_000_000
    known, waiting = asyncio.run(kept_back(size, 0, 4096))
    assert known and size - 64_000 < waiting <= size


@pytest.mark.parametrize("transport", [None, object()])
def test_a_transport_that_does_not_say_is_no_error(transport: object) -> None:
    assert unsent(transport) == (0, 0)


def test_a_responses_bytes_are_counted(tmp_path: Path) -> None:
    row = answered(tmp_path, 200, "/v1/completions", "POST", asked=True)[0]
    assert (row["response_bytes"], row["unsent_bytes"]) == (2, None)
