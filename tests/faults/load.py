"""A load that goes on in a thread until it is told to stop, and what its client saw of each request."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from openai import AsyncOpenAI
from quickstart.load import Request, Result, plan, send

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engines.server import Server

WIDTH = 4
TIMEOUT_S = 45.0
SOON_S = 5.0
# The same on every server: greedy, so that a hook that changes a result shows.
QUESTIONS = tuple(Request(request.messages, 24) for request in plan(6, seed=9))


@dataclass
class Load:
    """Streaming chat requests, some at once; no retries, so that a failure is seen."""

    server: Server
    results: list[Result] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def ended_since(self, moment_s: float) -> list[Result]:
        """What ended after a moment of time.monotonic()."""
        return [result for result in self.results if result.started_s + result.duration_s > moment_s]

    def wait_for(self, count: int, patience_s: float = 60.0) -> None:
        """Waits until so many more requests have ended. Raises TimeoutError when they do not in time."""
        wanted, deadline = len(self.results) + count, time.monotonic() + patience_s
        while len(self.results) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.results)} of {wanted} requests have ended")
            time.sleep(0.05)

    async def _run(self) -> None:
        requests = iter(plan(5_000, seed=2))
        async with AsyncOpenAI(
            base_url=self.server.base_url, api_key="none", max_retries=0, timeout=TIMEOUT_S
        ) as client:

            async def one_after_the_other() -> None:
                while not self._stop.is_set():
                    result = await send(client, self.server.model, next(requests))
                    self.results.append(result)
                    if result.error is not None:
                        await asyncio.sleep(0.2)

            await asyncio.gather(*(one_after_the_other() for _ in range(WIDTH)))


@contextmanager
def load_on(server: Server) -> Iterator[Load]:
    """A load on the server while the body runs; at its end the requests that are under way are waited for."""
    load = Load(server)
    thread = threading.Thread(target=lambda: asyncio.run(load._run()))
    thread.start()
    try:
        yield load
    finally:
        load._stop.set()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the load did not end"


def texts(results: list[Result]) -> list[str]:
    """The answers, all of them whole."""
    assert [result.error for result in results] == [None] * len(results)
    return [result.text for result in results]


@dataclass
class LongRequest:
    """A request that is under way, and the connection that its answer comes over."""

    id: str  # that its client has seen
    connection: socket.socket
    last: dict[str, Any] = field(default_factory=dict)  # what came last; an error has no id

    def hang_up(self) -> None:
        """The client is gone. A server that is told to end may wait for that."""
        with suppress(OSError):  # the server has closed it
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def long_request(server: Server) -> Iterator[LongRequest]:
    """A request that is under way while the body runs; at its end the client hangs up.

    It takes some 15 s: the server is to end while it goes on. Where this process was held up for so long that it may be
    over, it is another one.
    """
    for _ in range(3):
        begin = time.monotonic()
        with _asked(server) as made:
            if time.monotonic() - begin < SOON_S:
                yield made
                return
    raise TimeoutError(f"no first token within {SOON_S:.0f} s, three times")


@contextmanager
def _asked(server: Server) -> Iterator[LongRequest]:
    """The same, however long it took to begin."""
    where = urlsplit(server.base_url)
    options = {"max_tokens": 3_000, "stream": True, "ignore_eos": True}
    body = json.dumps({"model": server.model, "prompt": "on and on", **options}).encode()
    head = f"POST {where.path}/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    first: queue.Queue[str] = queue.Queue()
    last: dict[str, Any] = {}

    def read(answer: Any) -> None:
        told = False
        with suppress(OSError):
            for line in answer:
                if line.startswith(b"data: {"):
                    said = json.loads(line.removeprefix(b"data: "))
                    last.clear()
                    last.update(said)
                    if not told:
                        first.put(said["id"])
                        told = True

    with socket.create_connection((where.hostname or "", where.port or 0)) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        with connection.makefile("rb") as answer:
            thread = threading.Thread(target=read, args=(answer,))
            thread.start()
            made = None
            try:
                made = LongRequest(first.get(timeout=TIMEOUT_S), connection, last)
                yield made
            finally:
                (made or LongRequest("", connection)).hang_up()
                thread.join(TIMEOUT_S)
                assert not thread.is_alive(), "the request goes on"
