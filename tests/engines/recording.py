"""A real server recorded under `stagetrace run`, what its client saw, and what the server said of itself."""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2 as httpx
from engines.server import Server, serve
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from quickstart.load import Request, Result, send
from quickstart.servers import VLLM, Engine

from stagetrace.analysis.load import Frames, load
from stagetrace.exporters.session import Manifest, Session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

STAGETRACE = (sys.executable, "-m", "stagetrace.cli.main")


@dataclass
class Recording:
    """A session that is being recorded, and then has been."""

    path: Path
    server: Server
    results: list[Result] = field(default_factory=list)

    @property
    def session(self) -> Session:
        return Session.open(self.path)

    @property
    def manifest(self) -> Manifest:
        return self.session.read_manifest()

    def frames(self) -> Frames:
        return load(self.session)


@contextmanager
def record(
    model: Path,
    directory: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    run: Sequence[str] = (),
    engine: Engine = VLLM,
) -> Iterator[Recording]:
    """A server of `model` under `stagetrace run`; the session is complete when the body has been left.

    `run` are further options of `stagetrace run`. The rings lie in `directory`, as the session does.
    """
    path = directory / "session"
    wrapper = (*STAGETRACE, "run", "--session", str(path), *run, "--")
    rings = directory / "rings"
    with ExitStack() as stack:
        settings = {"STAGETRACE_RING_DIR": str(rings), **(env or {})}
        server = stack.enter_context(serve(model, *arguments, env=settings, wrapper=wrapper, engine=engine))
        yield Recording(path, server)
    assert not list(rings.rglob("*")), "rings were left behind"


def ask(server: Server, *requests: Request, headers: Mapping[str, str] | None = None) -> list[Result]:
    """Sends the requests one after the other."""

    async def talk() -> list[Result]:
        async with AsyncOpenAI(
            base_url=server.base_url, api_key="none", max_retries=0, default_headers=headers
        ) as client:
            return [await send(client, server.model, request) for request in requests]

    return asyncio.run(talk())


def complete(server: Server, headers: Mapping[str, str] | None = None, **body: object) -> dict[str, object]:
    """One completion that is not streamed: the response's JSON."""
    response = httpx.post(
        f"{server.base_url}/completions", json={"model": server.model, **body}, headers=headers, timeout=120
    )
    response.raise_for_status()
    answer: dict[str, object] = response.json()
    return answer


def abort_after(server: Server, chunks: int, max_tokens: int) -> None:
    """A streamed completion whose client goes away after some chunks."""
    body = {"model": server.model, "prompt": "go away", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.base_url}/completions", json=body, timeout=120) as response:
        seen = 0
        for line in response.iter_lines():
            seen += line.startswith("data: ")
            if seen == chunks:
                return


def metrics(server: Server) -> dict[str, float]:
    """The server's own metrics: sums over all labels, histograms as `_count` and `_sum`."""
    with urllib.request.urlopen(f"{server.root_url}/metrics") as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
