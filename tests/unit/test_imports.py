"""Tests that what the engine's process imports is the standard library and stagetrace's own, and only when armed."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from unit.wheel import CHECKOUT, clean_variables, command

if TYPE_CHECKING:
    from pathlib import Path

IN_ENGINE = ("instrument", "adapters")
# Triton's kernel is source that Triton compiles. What uses it imports it where there is a Triton, the engine's own.
OF_TRITON = "stagetrace.adapters.mark_kernel"
MODULES = sorted(
    ".".join(("stagetrace", *file.relative_to(CHECKOUT).with_suffix("").parts)).removesuffix(".__init__")
    for top in IN_ENGINE
    for file in (CHECKOUT / top).rglob("*.py")
    if file.stem != OF_TRITON.rpartition(".")[2]
)
# Without site-packages a third-party import fails; with them one that is only tried is seen. The checkout's link is on
# the path either way, so that both see the same files.
WITHOUT_PACKAGES, WITH_PACKAGES = ["-I", "-S"], ["-I"]

IMPORT = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
importlib.import_module(sys.argv[2])
print(json.dumps(sorted(set(sys.modules) - before)))
"""

REGISTER = """
import builtins, json, os, sys
sys.path.insert(0, sys.argv[1])
def state():
    return list(sys.meta_path), list(sys.path_hooks), builtins.__import__, dict(vars(builtins))
before, modules = state(), set(sys.modules)
from stagetrace.adapters.vllm.plugin import register
result = register()
ours = sorted(name for name in set(sys.modules) - modules if name.partition(".")[0] == "stagetrace")
others = sorted({name.partition(".")[0] for name in set(sys.modules) - modules} - {"stagetrace"})
print(json.dumps({"ours": ours, "others": others, "same": state() == before, "result": result}))
"""


def test_there_are_modules_to_import():
    assert {"stagetrace.instrument.recorder", "stagetrace.adapters.vllm.hooks", "stagetrace.adapters.marks"} <= {
        *MODULES
    }
    assert OF_TRITON not in MODULES and (CHECKOUT / "adapters" / "mark_kernel.py").is_file()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("flags", [WITHOUT_PACKAGES, WITH_PACKAGES], ids=["without packages", "with packages"])
def test_module_loads_the_standard_library_alone(module: str, flags: list[str]):
    loaded = json.loads(command(sys.executable, *flags, "-c", IMPORT, CHECKOUT / ".check", module))
    assert module in loaded
    assert {name.partition(".")[0] for name in loaded} - {"stagetrace"} <= sys.stdlib_module_names
    ours = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("stagetrace.")}
    assert ours <= {f"stagetrace.{top}" for top in IN_ENGINE}


def registered(session: str | None) -> dict[str, Any]:
    env = clean_variables() | ({} if session is None else {"STAGETRACE_SESSION": session})
    found: dict[str, Any] = json.loads(
        command(sys.executable, *WITHOUT_PACKAGES, "-c", REGISTER, CHECKOUT / ".check", env=env)
    )
    return found


@pytest.mark.parametrize("session", [None, ""], ids=["unset", "empty"])
def test_not_armed_imports_and_patches_nothing(session: str | None):
    parts = ["stagetrace", "adapters", "vllm", "plugin"]
    own_and_parents = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    assert registered(session) == {"ours": own_and_parents, "others": [], "same": True, "result": None}


def test_armed_installs_the_hooks(tmp_path: Path):
    found = registered(str(tmp_path / "session"))
    assert found["same"] is False
    assert "stagetrace.instrument.hooks" in found["ours"]
    assert not (tmp_path / "session").exists()  # no role is known yet, so nothing is opened
