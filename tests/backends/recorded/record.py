"""Records the sessions of this folder anew, with a real vLLM and a real SGLang: when a test says that they are old.

    make recordings        (PYTHONPATH=tests:examples .venv/bin/python -m backends.recorded.record [--engine vllm])

The tests of trace backends are fed by sessions of real engines. They are kept here, a few ten kB each, since an engine
takes half a minute to start, is gigabytes, and gives other times each time; what is kept is the raw records, of which
the tests derive the tables as `stagetrace rebuild` does. The model is the quickstart's, a tiny Mixture of Experts, at
level layer. Beside the records lies what their numbers meant (vocabulary.json): test_recorded.py holds it against
today's tables. Names of the machine and its paths are replaced.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import httpx2 as httpx
import pyarrow.compute as pc
from backends.recorded.keep import HERE, HOST, MODEL, vocabulary
from engines.recording import Recording, abort_after, complete, record
from engines.server import environment
from quickstart.servers import ENGINES, MODEL_SCRIPT, Engine

from stagetrace.exporters.rebuild import rebuild_tables
from stagetrace.exporters.session import Session

ARGUMENTS = {
    "vllm": ("--enforce-eager", "--max-num-batched-tokens", "96"),
    "sglang": ("--chunked-prefill-size", "96", "--skip-server-warmup"),
}
SAMPLED = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "vendor=1"}
EXCLUDED = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="default: each")
    parser.add_argument("--into", type=Path, default=HERE, help="where to keep them; default: here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stagetrace-recorded-") as directory:
        for name in options.engine or ENGINES:
            kept = options.into / name
            keep(recorded(ENGINES[name], Path(directory) / name), kept)
            print(f"{kept}: {sum(path.stat().st_size for path in kept.rglob('*') if path.is_file()):,} bytes")


def recorded(engine: Engine, directory: Path) -> Session:
    """A session of a server with requests of many kinds."""
    directory.mkdir()
    model = directory / "model"
    subprocess.run([engine.python, MODEL_SCRIPT, model], env=environment(engine=engine), check=True)
    run = ("--level", "layer", "--no-report")
    with record(model, directory, *ARGUMENTS[engine.name], run=run, engine=engine) as recording:
        asyncio.run(at_once(recording))
        complete(recording.server, headers=SAMPLED, prompt="a caller that traces", max_tokens=3, ignore_eos=True)
        complete(recording.server, headers=EXCLUDED, prompt="a caller that does not", max_tokens=2, ignore_eos=True)
        abort_after(recording.server, chunks=2, max_tokens=200)
        time.sleep(0.5)  # the abort of a client that went away is noticed by and by
    return recording.session


async def at_once(recording: Recording) -> None:
    """Prompts from a line to a few chunks, with two answers each, together; and one that is too long."""

    async def one(client: httpx.AsyncClient, words: int, tokens: int) -> int:
        body = {"model": recording.server.model, "prompt": "word " * words, "max_tokens": tokens, "n": 2}
        answer = await client.post(f"{recording.server.base_url}/completions", json={**body, "ignore_eos": True})
        return int(answer.status_code)

    async with httpx.AsyncClient(timeout=120) as client:
        found = await asyncio.gather(*(one(client, 2 + 12 * number, 3 + number % 3) for number in range(5)))
        assert set(found) == {200}, found
        assert 400 <= await one(client, 100_000, 1) < 500


def keep(session: Session, into: Path) -> None:
    """Copies what a session is made of, without names of this machine, and says what its numbers mean."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    shutil.copy(session.path / "session.json", into)
    for name in ("raw", "model"):
        shutil.copytree(session.path / name, into / name)
    manifest = json.loads((session.path / "manifest.json").read_text())
    manifest["command"] = ["server"]
    for process in manifest["processes"]:
        process["info"] = {name: MODEL if "model" in name else value for name, value in process["info"].items()}
    text = json.dumps(manifest).replace(json.dumps(manifest["host"])[1:-1], HOST)
    (into / "manifest.json").write_text(text + "\n")
    kept = Session.open(into)
    rebuild_tables(kept, lambda *_: None)
    stages = {
        number
        for name in ("segments", "states")
        for number in pc.unique(kept.read_table(name, ["stage"])["stage"]).to_pylist()
    }
    shutil.rmtree(into / "tables")
    (into / "vocabulary.json").write_text(json.dumps(vocabulary(stages), indent=1) + "\n")


if __name__ == "__main__":
    main()
