"""The environment that arms an engine. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

PLUGIN = "stagetrace"
# When set, engines load only the plugins that they name; the empty list is none to vLLM and all to SGLang.
PLUGIN_VARIABLES = {"VLLM_PLUGINS": False, "SGLANG_PLUGINS": True}  # variable -> whether an empty list is all
RING_DIRECTORY = "STAGETRACE_RING_DIR"


def armed_environment(
    environment: Mapping[str, str], session: Path, level: str, maximum: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """The environment for an engine that records into `session` at `level`, and what the user should be told.

    With `maximum` hooks up to that level are installed, for `stagetrace ctl` to switch to.
    """
    armed = {**environment, "STAGETRACE_SESSION": str(session.resolve()), "STAGETRACE_LEVEL": level}
    if maximum is not None:
        armed["STAGETRACE_MAX_LEVEL"] = maximum
    if environment.get(RING_DIRECTORY):
        armed[RING_DIRECTORY] = str(Path(environment[RING_DIRECTORY]).resolve())
    notes = []
    for variable, empty_is_all in PLUGIN_VARIABLES.items():
        listed = environment.get(variable)
        if listed is None or PLUGIN in listed.split(",") or (empty_is_all and not listed):
            continue
        armed[variable] = ",".join(name for name in (*listed.split(","), PLUGIN) if name)
        armed[f"STAGETRACE_{variable}"] = listed  # a part of vLLM's compile key: adapters/vllm/compile_key.py
        notes.append(f"{variable} excludes stagetrace: it runs with {variable}={armed[variable]}")
    return armed, notes
