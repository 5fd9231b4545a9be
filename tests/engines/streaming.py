"""A client that does nothing but take the time: streamed completions over plain connections, one after another.

Several at once would wait for each other where no figure of the server's own has it: before they arrive, and in this
client, which shares two cores with the engine. It is a process of its own, since the tests' has other work:

    python streaming.py BASE_URL MODEL MAX_TOKENS < PROMPTS.json
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from engines.server import Server

_END = b"data: [DONE]"


@dataclass(frozen=True)
class Streamed:
    """When a client sent a request and got each of its chunks, in ns of the monotonic clock."""

    id: str
    tokens: int
    sent_ns: int
    chunks_ns: list[int]  # of those with text
    end_ns: int  # of the last byte

    @property
    def to_first_token(self) -> int:
        """ns."""
        return self.chunks_ns[0] - self.sent_ns

    @property
    def between_tokens(self) -> float:
        """ns a token, after the first."""
        return (self.chunks_ns[-1] - self.chunks_ns[0]) / (self.tokens - 1)

    @property
    def end_to_end(self) -> int:
        """ns."""
        return self.end_ns - self.sent_ns


def stream(server: Server, prompts: list[str], max_tokens: int) -> list[Streamed]:
    """Sends them one after the other, each over a connection of its own; in another process."""
    done = subprocess.run(
        [sys.executable, __file__, server.base_url, server.model, str(max_tokens)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=True,
    )
    return [Streamed(**each) for each in json.loads(done.stdout)]


async def _talk(base_url: str, model: str, max_tokens: int, prompts: list[str]) -> list[Streamed]:
    where = urlsplit(base_url)
    return [
        await _one(model, *await asyncio.open_connection(where.hostname, where.port), prompt, max_tokens)
        for prompt in prompts
    ]


async def _one(
    model: str,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    prompt: str,
    max_tokens: int,
) -> Streamed:
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": max_tokens, **options}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    sent = time.monotonic_ns()
    writer.write(head.encode() + b"\r\n\r\n" + body)
    lines: list[tuple[int, bytes]] = []
    while not lines or not lines[-1][1].startswith(_END):
        line = await reader.readline()
        if not line:
            raise ConnectionError(f"the stream ended early, with {lines[-3:]}")
        if line.startswith(b"data: "):
            lines.append((time.monotonic_ns(), line))
    end = time.monotonic_ns()
    writer.close()
    answers = [(at, json.loads(line.removeprefix(b"data: "))) for at, line in lines[:-1]]
    usage = answers[-1][1]["usage"]
    chunks = [at for at, answer in answers if answer["choices"]]
    return Streamed(answers[0][1]["id"], usage["completion_tokens"], sent, chunks, end)


if __name__ == "__main__":
    answers = asyncio.run(_talk(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.load(sys.stdin)))
    json.dump([asdict(each) for each in answers], sys.stdout)
