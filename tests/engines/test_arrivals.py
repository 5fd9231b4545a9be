"""What the front end's hook makes of vLLM's own requests: their names, and whose trace they continue."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from engines.recording import STAGETRACE
from engines.server import environment

from stagetrace.analysis.load import load
from stagetrace.exporters.session import Session
from stagetrace.instrument.ids import request_span_id, request_trace_id

SCRIPT = Path(__file__).with_name("arrivals.py")
TRACE, PARENT = "8bf92f3577b34da6a3ce929d0e0e4736", "40f067aa0ba902b7"


def test_arrivals(engine_python: Path, tmp_path: Path) -> None:
    env = environment({"STAGETRACE_RING_DIR": str(tmp_path / "rings")})
    command = [*STAGETRACE, "run", "--no-report", "--session", str(tmp_path / "session"), "--"]
    done = subprocess.run(
        [*command, str(engine_python), str(SCRIPT)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    given = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    session = Session.open(tmp_path / "session")
    assert not any(process.errors for process in session.read_manifest().processes)
    rows = {row["request_id"]: row for row in load(session)["requests"].to_dict("records")}
    assert set(rows) == set(given) - {"the span"}
    assert all(row["external_id"].endswith("-outside") for row in rows.values())
    assert {name: row["lora"] for name, row in rows.items() if isinstance(row["lora"], str)} == {"lora": "an adapter"}
    assert {name: row["priority"] for name, row in rows.items() if row["priority"]} == {"alone": -3}

    def continued(name: str) -> tuple[str, str | None]:
        return rows[name]["trace_id"], rows[name]["parent_span_id"]

    _, trace, span, _ = given["the span"].split("-")
    assert continued("in a span") == continued("in a span, traced") == (trace, span)
    for name in ("given", "given, traced", "of a job"):
        assert continued(name) == (TRACE, PARENT)
    assert [rows[name]["trace_state"] for name in ("given", "of a job")] == ["vendor=1", "vendor=2"]

    # vLLM's own span: under the caller's as ours is, else under ours. What it does not export gets nothing.
    key = session.identity.key
    assert given["in a span, traced"] == given["the span"]
    assert given["given, traced"] == f"00-{TRACE}-{PARENT}-01"
    assert [given[name] for name in ("alone", "lora", "in a span", "of a job")] == [None] * 4
    children = [rows[f"{index}_several"] for index in range(2)]
    assert len({row["parent"] for row in children}) == 1
    for row, root in ((rows["alone, traced"], "handle"), *((row, "parent") for row in children)):
        trace_id, span_id = request_trace_id(key, int(row[root])), request_span_id(key, int(row["handle"]))
        assert given[row["request_id"]] == f"00-{trace_id.hex()}-{span_id.hex()}-01"
        assert row["trace_id"] == trace_id.hex()
