"""The baseline that the other engine tests build on: bare engine, tiny model and load, without stagetrace."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from engines.server import SHARED_MEMORY, Server, Watch, serve, shared_memory
from openai import AsyncOpenAI
from quickstart.load import Request, Result, plan, run_load, send, summarize
from quickstart.servers import StartError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUESTION = Request(({"role": "user", "content": "where does the time go"},), max_tokens=48)


def test_server_that_cannot_start_says_why(model: Path) -> None:
    with pytest.raises(StartError, match="ended with exit status") as failure, serve(model, "--no-such-flag"):
        pytest.fail("a server with an unknown flag became ready")
    assert "--no-such-flag" in "".join(failure.value.__notes__)


def test_what_is_left_behind_is_named_and_removed(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY, delete=False) as shared:
        os.ftruncate(shared.fileno(), 4096)
        held = mmap.mmap(shared.fileno(), 4096)
    own = {file for file in shared_memory(os.getpid()) if file == shared.name}
    held.close()
    with subprocess.Popen(["bash", "-c", "sleep 300 & exec sleep 300"], start_new_session=True) as process:
        watch = Watch(Server("", process, tmp_path / "log"))
        while len(watch.processes) < 2:
            watch.look()
        watch.files |= own
        (child,) = [one for one in watch.processes if one.pid != process.pid]
        left = watch.end(patience_s=0.5)
    assert left == [f"process {child.pid} (sleep 300)", shared.name]
    assert watch.left() == []


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serve(model, "--enforce-eager", "--max-num-batched-tokens", "512") as started:
        yield started
        watch = Watch(started)
        watch.look()
    # The engine core and the worker are processes of their own, and talk over shared memory: both are to be gone.
    assert len(watch.processes) >= 3
    assert watch.files
    assert watch.left() == []


def ask(server: Server, *requests: Request) -> list[Result]:
    """Sends the requests one after the other."""

    async def talk() -> list[Result]:
        async with AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            return [await send(client, server.model, request) for request in requests]

    return asyncio.run(talk())


def test_greedy_output_is_the_same_twice(server: Server) -> None:
    first, again, other = ask(server, QUESTION, QUESTION, plan(1, seed=3)[0])
    assert first.error is None
    assert again.error is None
    assert first.output_tokens == QUESTION.max_tokens
    assert first.text == again.text
    assert first.text != other.text, "the model answers everything alike: it would hide a changed result"
    # A model that repeats one token would hide a change as well.
    assert len(set(first.text)) > 10
    assert first.id != again.id
    assert first.first_token_s is not None
    assert first.last_token_s is not None
    assert 0 < first.first_token_s < first.last_token_s <= first.duration_s


def test_load_is_served_whole(server: Server) -> None:
    results = asyncio.run(run_load(server.base_url, server.model, requests=21, seed=1))
    assert [result.error for result in results] == [None] * 21
    assert [result.concurrency for result in results] == [1] * 3 + [4] * 6 + [16] * 12
    assert [result.output_tokens for result in results] == [request.max_tokens for request in plan(21, seed=1)]
    figures = summarize(results)
    assert figures.failed == 0
    assert figures.prompt_tokens == sum(result.prompt_tokens for result in results) > 1000
    assert 0 < figures.ttft_p50_s <= figures.ttft_p95_s < figures.span_s
    assert 0 < figures.tpot_p50_s <= figures.tpot_p95_s < figures.ttft_p95_s + 1


def test_failed_requests_are_results(server: Server) -> None:
    (result,) = ask(replace(server, model="another"), QUESTION)
    assert result.error is not None
    assert "another" in result.error
    assert summarize([result]).failed == 1
