"""Puts a planned load on a server."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from quickstart.load import _words
from quickstart.servers import HOST, MODEL_NAME

from .plan import Ask


async def send(asks: Sequence[Ask], width: int | None, port: int, seed: int) -> list[str]:
    """Sends the requests as planned; what went wrong, by request."""
    chance = random.Random(seed)
    shared = _words(chance, 400)
    texts = [f"{' '.join(shared.split()[: ask.shared])} {_words(chance, ask.words - ask.shared)}" for ask in asks]
    gate = asyncio.Semaphore(width or len(asks))
    began = time.monotonic()
    wrong: list[str] = []

    async def one(ask: Ask, text: str) -> None:
        if width is None:
            await asyncio.sleep(max(began + ask.at_s - time.monotonic(), 0))
        async with gate:
            try:
                await _stream(ask, text, port)
            except (OSError, ValueError) as error:
                wrong.append(f"{type(error).__name__}: {error}")

    await asyncio.gather(*(one(ask, text) for ask, text in zip(asks, texts, strict=True)))
    return wrong


async def _stream(ask: Ask, text: str, port: int) -> None:
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": ask.tokens,
        "temperature": ask.temperature,
        "stream": True,
    }
    if ask.schema is None:
        body["ignore_eos"] = True
    else:
        names = {f"field_{ask.schema}_{number}": {"type": "string"} for number in range(4)}
        schema = {"type": "object", "properties": names, "required": [*names]}
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if ask.answers > 1:
        body["n"] = ask.answers
    if ask.logprobs:
        body |= {"logprobs": True, "top_logprobs": ask.logprobs}
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    slow = ask.reads_s > 0
    reader, writer = await _connected(port, slow)
    try:
        writer.write(head.encode() + data)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(f"the server answered {status.decode().strip()}: {(await reader.read(2000))[-300:]!r}")
        while piece := await reader.read(4096 if slow else 65536):
            if slow:
                await asyncio.sleep(ask.reads_s)
            del piece
    finally:
        writer.close()


async def _connected(port: int, slow: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection; that of a slow client has small buffers and packets, as a phone far away does.

    A server's kernel keeps back what some packets' worth of buffers hold: 3 MB with those of loopback, of 64 KiB, and
    170 kB with Ethernet's.
    """
    import socket

    if not slow:
        return await asyncio.open_connection(HOST, port)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
    return await asyncio.open_connection(sock=connection, limit=4096)
