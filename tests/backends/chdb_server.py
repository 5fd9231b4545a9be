"""ClickHouse's HTTP interface, as far as the tests need it, over chDB: run by the interpreter of .venv-clickhouse.

python chdb_server.py DIRECTORY        prints its port, and serves until its standard input ends
"""

from __future__ import annotations

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from chdb.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator

directory = Path(sys.argv[1])
session = Session(str(directory / "data"))
one = threading.Lock()  # connections are kept open, and the database takes one query at a time


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) + b"".join(self.chunks())
        given = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        status, answer = 200, b""
        try:
            with one:
                answer = self.run(given["query"], body, given.get("insert_deduplication_token"))
        except Exception as error:
            status, answer = (404 if "UNKNOWN_DATABASE" in str(error) else 500), str(error).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def chunks(self) -> Iterator[bytes]:
        while self.headers.get("Transfer-Encoding") == "chunked":
            length = int(self.rfile.readline(), 16)
            yield self.rfile.read(length)
            self.rfile.readline()
            if not length:
                return

    def run(self, query: str, body: bytes, token: str | None) -> bytes:
        if not body:
            return session.query(query, "JSONEachRow").bytes()
        path = directory / "body"
        path.write_bytes(body)
        insert, _, form = query.rpartition(" FORMAT ")
        settings = f" SETTINGS insert_deduplication_token = '{token}'" if token else ""
        structure = ""
        if form == "RowBinary":  # which says nothing of its columns: they are those of the table that are named
            table, named = re.fullmatch(r"INSERT INTO (\w+) \((.*)\)", insert).groups()
            rows = session.query(f"DESCRIBE TABLE {table}", "JSONEachRow").bytes().splitlines()
            types = {row["name"]: row["type"] for row in map(json.loads, rows)}
            columns = ", ".join(f"`{name}` {types[name]}" for name in named.split(","))
            structure = f", '{columns}'"
        return session.query(f"{insert}{settings} SELECT * FROM file('{path}', '{form}'{structure})").bytes()

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
print(server.server_address[1], flush=True)
server.serve_forever()
session.close()
