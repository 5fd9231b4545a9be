"""The extractors on objects of the engine's own classes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from engines.server import environment


def test_composition_of_vllms_own_batches(engine_python: Path) -> None:
    script = Path(__file__).with_name("composition.py")
    done = subprocess.run([engine_python, script], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
