"""A client that does nothing but take the time: streamed completions over plain sockets, one after another.

Several at once would wait for each other where no figure of the server's own has it: before they arrive, and in this
client, which shares two cores with the engine. It is a process of its own, since the tests' has other work:

    python streaming.py BASE_URL MODEL MAX_TOKENS < PROMPTS.json

A client that is waiting for a processor reads late what has come. So of every read it asks the kernel when the last of
its bytes was there (SO_TIMESTAMPING), and how long a byte takes there and back on this machine while the engine works.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from engines.server import Server

_SO_TIMESTAMPING = 37  # of Linux; Python has no name for it
_RECEIVED_BY_SOFTWARE = 1 << 3 | 1 << 4
_TIME = struct.Struct("qq")
_END = b"data: [DONE]"
_DATA = b"data: "
_ECHOES = 50


@dataclass(frozen=True)
class Streamed:
    """When a client sent a request and had each of its chunks, in ns of the monotonic clock."""

    id: str
    tokens: int
    sent_ns: int
    chunks_ns: list[int]  # of those with text, when they were read
    first_there_ns: int  # when the kernel had the first of them
    first_alone: bool  # whether it was read before another one had come, so that this is known
    end_there_ns: int  # when the kernel had the last byte
    way_ns: int  # a byte's way to another process and back

    @property
    def to_first_token(self) -> int:
        """ns."""
        return self.first_there_ns - self.sent_ns

    @property
    def between_tokens(self) -> float:
        """ns a token, after the first."""
        return (self.chunks_ns[-1] - self.chunks_ns[0]) / (self.tokens - 1)

    @property
    def end_to_end(self) -> int:
        """ns."""
        return self.end_there_ns - self.sent_ns


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


def _one(address: tuple[str, int], model: str, prompt: str, max_tokens: int, way_ns: int) -> Streamed:
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": max_tokens, **options}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    reads: list[tuple[int, int, int]] = []  # when it was read, when it was there, what had come then
    answer = b""
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPING, _RECEIVED_BY_SOFTWARE)
        sent = time.monotonic_ns()
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        while _END not in answer:
            data, told, _, _ = connection.recvmsg(1 << 16, 256)
            read = time.monotonic_ns()
            if not data:
                raise ConnectionError(f"the stream ended early: {answer[-200:]!r}")
            answer += data
            reads.append((read, _there(told, read), len(answer)))
    lines = [line for line in answer.split(b"\n") if line.startswith(_DATA)]
    answers = [json.loads(line.removeprefix(_DATA)) for line in lines[:-1]]
    first = next(number for number, (_, _, length) in enumerate(reads) if answer.find(_DATA) < length)
    chunks, at = [], 0
    for line, each in zip(lines, answers, strict=False):
        at = answer.index(line, at) + len(line)
        if each["choices"]:
            chunks.append(next(read for read, _, length in reads if at <= length))
    return Streamed(
        id=answers[0]["id"],
        tokens=answers[-1]["usage"]["completion_tokens"],
        sent_ns=sent,
        chunks_ns=chunks,
        first_there_ns=reads[first][1],
        first_alone=answer[: reads[first][2]].count(_DATA) == 1,
        end_there_ns=reads[-1][1],
        way_ns=way_ns,
    )


def _there(told: list[tuple[int, int, bytes]], read: int) -> int:
    """When the kernel had what was read at `read`, by what it said beside: on the wall clock. Else when it was read."""
    for level, kind, data in told:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPING):
            seconds, nanoseconds = _TIME.unpack_from(data)
            return read - (time.time_ns() - seconds * 1_000_000_000 - nanoseconds)
    return read


def _way() -> int:
    """ns that a byte takes to another process and back, the middle one of some, a moment apart."""
    here, there = socket.socketpair()
    child = os.fork()
    if not child:
        here.close()
        while there.recv(1):
            there.send(b".")
        os._exit(0)
    there.close()
    taken = []
    for _ in range(_ECHOES):
        time.sleep(0.002)
        begin = time.monotonic_ns()
        here.send(b".")
        here.recv(1)
        taken.append(time.monotonic_ns() - begin)
    here.close()
    os.waitpid(child, 0)
    return int(statistics.median(taken))


def main() -> None:
    where = urlsplit(sys.argv[1])
    assert where.hostname is not None and where.port is not None
    address = (where.hostname, where.port)
    found = [_one(address, sys.argv[2], prompt, int(sys.argv[3]), _way()) for prompt in json.load(sys.stdin)]
    json.dump([asdict(each) for each in found], sys.stdout)


if __name__ == "__main__":
    main()
