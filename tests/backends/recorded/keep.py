"""Sessions of real engines that are kept in this folder: how they are used, and whether they are of today's format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagetrace.exporters.rebuild import rebuild_tables
from stagetrace.exporters.session import MANIFEST_VERSION, Session, SessionError
from stagetrace.instrument import records
from stagetrace.instrument.stages import BY_ID, STEP_COMPOSITION

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE = Path(__file__).resolve().parent
ENGINES = ("vllm", "sglang")
HOST, MODEL = "node-1", "tiny-moe"  # in the place of the machine's
ANEW = "`make recordings` records it anew (two engines for the CPU, two minutes)"


class Old(Exception):
    """A recording is not of today's format; the message says what differs and what to do."""


def vocabulary(stages: Iterable[int]) -> dict[str, Any]:
    """What numbers in records stand for: the stages' names and their attributes', and a step's."""
    return {
        "records": records.VERSION,
        "slot": records.SLOT_SIZE,
        "manifest": MANIFEST_VERSION,
        "step": [attribute.name for attribute in STEP_COMPOSITION],
        "stages": {
            str(number): [BY_ID[number].name, *(attribute.name for attribute in BY_ID[number].attributes)]
            for number in sorted(stages)
        },
    }


def differences(then: dict[str, Any]) -> list[str]:
    """Where today's vocabulary is another; what was added since, behind the rest, is no difference."""
    stages = {int(number): words for number, words in then["stages"].items()}
    now = vocabulary(number for number in stages if number in BY_ID)
    found = [
        f"{name}: {then[name]}, today {now[name]}"
        for name in ("records", "slot", "manifest")
        if then[name] != now[name]
    ]
    pairs = {"step": (then["step"], now["step"])}
    pairs |= {f"stage {number}": (words, now["stages"].get(str(number), [])) for number, words in stages.items()}
    found += [f"{name}: {was}, today {has}" for name, (was, has) in pairs.items() if has[: len(was)] != was]
    return found


def rebuilt(engine: str, directory: Path, kept: Path = HERE) -> Session:
    """A copy of an engine's session, its tables derived from the raw records. Raises Old."""
    path = directory / engine
    shutil.copytree(kept / engine, path)
    if found := differences(json.loads((path / "vocabulary.json").read_text())):
        raise Old(f"the recording of {engine} is old: {'; '.join(found)}. {ANEW}")
    try:
        session = Session.open(path)
        session.read_manifest()
        result = rebuild_tables(session, lambda *_: None)
    except SessionError as error:
        raise Old(f"the recording of {engine} is old: {error}. {ANEW}") from error
    if result.damaged:
        raise Old(f"the recording of {engine} is old: {'; '.join(result.damaged)}. {ANEW}")
    return session
