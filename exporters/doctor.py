"""What `stagetrace doctor` looks up on this host: the rings of a session, and what keeps engines from our plugin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .arm import PLUGIN_VARIABLES, armed_environment
from .discover import Discovery

if TYPE_CHECKING:
    from collections.abc import Mapping


def excluding_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The set variables by which an engine leaves our plugin out, with the values that `stagetrace run` gives them."""
    armed, _ = armed_environment(environment, Path(), "")
    return {name: armed[name] for name in PLUGIN_VARIABLES if armed.get(name) != environment.get(name)}


def rings_on_disk(session: str) -> dict[str, tuple[bool, dict[str, int]]]:
    """The rings of a session that lie in this environment's ring directory, by file name.

    Each with whether its process lives, and the slots of its control and of its detail ring. Files that are no ring
    of this version are left out.
    """
    found = {}
    for reader in Discovery(session).look():
        slots = {area.losses.ring: len(area.slots) for area in reader.areas}
        found[reader.path.name] = reader.alive(), slots
        reader.close()
    return found
