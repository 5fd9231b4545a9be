"""ClickHouse's HTTP interface, as far as the tests need it, over chDB: run by the interpreter of .venv-clickhouse.

python chdb_server.py DIRECTORY        prints its port, and serves until its standard input ends
"""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from chdb.session import Session

directory = Path(sys.argv[1])
session = Session(str(directory / "data"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        given = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        status, answer = 200, b""
        try:
            answer = self.run(given["query"], body, given.get("insert_deduplication_token"))
        except Exception as error:
            status, answer = (404 if "UNKNOWN_DATABASE" in str(error) else 500), str(error).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def run(self, query: str, body: bytes, token: str | None) -> bytes:
        if not body:
            return session.query(query, "JSONEachRow").bytes()
        path = directory / "body"
        path.write_bytes(body)
        insert, _, form = query.rpartition(" FORMAT ")
        settings = f" SETTINGS insert_deduplication_token = '{token}'" if token else ""
        return session.query(f"{insert}{settings} SELECT * FROM file('{path}', '{form}')").bytes()

    def log_message(self, *_: object) -> None:
        pass


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
print(server.server_address[1], flush=True)
server.serve_forever()
session.close()
