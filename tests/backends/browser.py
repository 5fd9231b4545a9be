"""A headless Chromium that the tests drive, and a server of the pages that it is to show: all of it on loopback.

The browser is Debian's; it is spoken to by its own protocol (Chrome DevTools) over two pipes.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PROGRAMS = ("chromium-headless-shell", "chromium")
_PATIENCE_S = 60.0


class Browser:
    """One page of a browser. Use as a context manager."""

    def __init__(self, directory: Path, width: int = 1600, height: int = 1000):
        program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
        assert program, "these tests need a browser: apt-get install chromium-headless-shell (make backends does it)"
        self._numbers = 0
        self._unread = b""
        to_browser, self._writes = os.pipe()
        self._reads, from_browser = os.pipe()
        # It reads descriptor 3 and writes 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}', program, "--headless", "--no-sandbox",
             "--remote-debugging-pipe", "--enable-unsafe-swiftshader", f"--window-size={width},{height}",
             "--hide-scrollbars", "--no-first-run", f"--user-data-dir={directory / 'profile'}"],
            pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._session: str | None = None

    def __enter__(self) -> Browser:
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._ask("Page.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._reads)
        os.close(self._writes)

    def _ask(self, method: str, **params: object) -> Any:
        """Sends a command and waits for its answer; events in between are passed over."""
        self._numbers += 1
        message = {"id": self._numbers, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._numbers:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _next(self) -> Any:
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._reads], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            piece = os.read(self._reads, 1 << 16)
            assert piece, f"the browser ended (exit status {self._process.wait()})"
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        self._ask("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """What an expression gives, awaited; as JSON."""
        given = {"expression": script, "awaitPromise": True, "returnByValue": True}
        answer = self._ask("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, patience_s: float = _PATIENCE_S) -> Any:
        """Until an expression gives something; what it gave."""
        deadline = time.monotonic() + patience_s
        while not (found := self.run(f"(() => {{ try {{ return {script} }} catch (error) {{ return null }} }})()")):
            assert time.monotonic() < deadline, f"{script} did not come true: {self.run('document.body.innerText')}"
            time.sleep(0.1)
        return found

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def pages(directory: Path) -> Iterator[str]:
    """The address at which the files of a directory are served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
