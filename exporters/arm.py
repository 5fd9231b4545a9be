"""The environment that arms an engine. Pure."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from stagetrace.instrument.device_marks import DEFAULT_LAYERS, MARK_LAYERS, MARKS, PLACES, Choice
from stagetrace.instrument.levels import named
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from collections.abc import Mapping

PLUGIN = "stagetrace"
# When set, engines load only the plugins that they name; the empty list is none to vLLM and all to SGLang.
PLUGIN_VARIABLES = {"VLLM_PLUGINS": False, "SGLANG_PLUGINS": True}  # variable -> whether an empty list is all
RING_DIRECTORY = "STAGETRACE_RING_DIR"
MAX_LEVEL = "STAGETRACE_MAX_LEVEL"
_NO_MARKS = Choice()


def parse_marks(text: str, layers: int | None = None) -> Choice:
    """What is to have marks: names of PLACES with commas between, in so many layers.

    Raises ValueError for what is neither, and says what can be chosen.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PLACES]
    if unknown:
        raise ValueError(f"there are no marks around {unknown[0]!r}: choose some of {', '.join(PLACES)}, with commas")
    if layers is not None and layers < 1:
        raise ValueError(f"marks cannot be in {layers} layers: choose 1 or more")
    return Choice(tuple(place for place in PLACES if place in names), DEFAULT_LAYERS if layers is None else layers)


def armed_environment(
    environment: Mapping[str, str],
    session: Path,
    level: str,
    maximum: str | None = None,
    marks: Choice = _NO_MARKS,
) -> tuple[dict[str, str], list[str]]:
    """The environment for an engine that records into `session` at `level`, and what the user should be told.

    With `maximum` hooks up to that level are installed, for `stagetrace ctl` to switch to; for marks at least those of
    level layer, as these launch them.
    """
    armed = {**environment, "STAGETRACE_SESSION": str(session.resolve()), "STAGETRACE_LEVEL": level}
    notes = []
    if maximum is not None:
        armed[MAX_LEVEL] = maximum
    for variable in (MARKS, MARK_LAYERS):  # what the shell had is in `marks` already, as `stagetrace run` reads it
        armed.pop(variable, None)
    if marks.places:
        armed |= {MARKS: ",".join(marks.places), MARK_LAYERS: str(marks.layers)}
        notes += _raised_for_marks(armed, session, named(level, Level.STEP))
    if environment.get(RING_DIRECTORY):
        armed[RING_DIRECTORY] = str(Path(environment[RING_DIRECTORY]).resolve())
    for variable, empty_is_all in PLUGIN_VARIABLES.items():
        listed = environment.get(variable)
        if listed is None or PLUGIN in listed.split(",") or (empty_is_all and not listed):
            continue
        armed[variable] = ",".join(name for name in (*listed.split(","), PLUGIN) if name)
        armed[f"STAGETRACE_{variable}"] = listed  # a part of vLLM's compile key: adapters/vllm/compile_key.py
        notes.append(f"{variable} excludes stagetrace: it runs with {variable}={armed[variable]}")
    return armed, notes


def _raised_for_marks(armed: dict[str, str], session: Path, level: Level) -> list[str]:
    """Has hooks installed that can launch marks; what the user should be told."""
    notes = []
    asked = armed.get(MAX_LEVEL)
    if named(asked, max(level, Level.STEP)) < Level.LAYER:
        armed[MAX_LEVEL] = Level.LAYER.name.lower()
        if asked:
            notes.append(f"marks are launched by hooks of level layer: these are installed, not only those of {asked}")
    if level < Level.LAYER:
        notes.append(
            "marks are captured into graphs, and read from level layer on: `stagetrace ctl level layer --session"
            f" {quote(str(session))}` begins that, level {level.name.lower()} ends it"
        )
    return notes
