"""A steady load on an OpenAI-compatible server: so many streaming requests at once, each followed by the next.

Every request is as long as the others, so that one part of the run can be compared with another. It reads the HTTP
answer itself: a client library's own work on every token would take from the server what is to be measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from dataclasses import dataclass, field

HOST = "127.0.0.1"
_VOCABULARY = range(10, 1000)  # token ids that every tiny model has


@dataclass
class Seen:
    """What the client saw, with times of time.monotonic() in s. Lists are only appended to, by one thread."""

    tokens: list[tuple[float, int, float]] = field(default_factory=list)  # when, how many, s since the ones before
    firsts: list[tuple[float, float]] = field(default_factory=list)  # when, s since the request was sent
    ends: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Load:
    """The load, in a thread of its own, while the context is open."""

    def __init__(self, port: int, model: str, width: int, prompt_tokens: int, output_tokens: int, seed: int = 5):
        self.port, self.model, self.width = port, model, width
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.seen = Seen()
        self._chance = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    async def _run(self) -> None:
        await asyncio.gather(*(self._one_after_another(number) for number in range(self.width)))

    async def _one_after_another(self, number: int) -> None:
        await asyncio.sleep(number / self.width)  # so that they do not all begin, and end, together
        while not self._over.is_set():
            try:
                await self._request()
            except (OSError, ValueError, KeyError, IndexError) as error:
                self.seen.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)

    async def _request(self) -> None:
        body = json.dumps(
            {
                "model": self.model,
                "prompt": self._chance.choices(_VOCABULARY, k=self.prompt_tokens),
                "max_tokens": self.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        started = time.monotonic()
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            writer.write(head.encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise ValueError(f"the server answered {status.decode().strip()}")
            had, last = 0, started
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                now = time.monotonic()
                count = json.loads(line[6:])["usage"]["completion_tokens"]
                if count <= had:
                    continue
                if had:
                    self.seen.tokens.append((now, count - had, now - last))
                else:
                    self.seen.firsts.append((now, now - started))
                had, last = count, now
            if had != self.output_tokens:
                raise ValueError(f"{had} tokens instead of {self.output_tokens}")
            self.seen.ends.append(last)
        finally:
            writer.close()
