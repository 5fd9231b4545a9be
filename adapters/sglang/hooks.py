"""The hook points in SGLang: which function, what the handler relies on, from which level on, and what it gives.

SGLang's own HookRegistry is not used. It imports every module that it patches, in every process (the tokenizer and the
detokenizer would import the model), looks through all loaded modules for each target, and lets a hook's error through.
The plugin's door is: from there modules are patched when the engine imports them, so each process has what it runs.
"""

from __future__ import annotations

from stagetrace.instrument.hooks import HookPoint
from stagetrace.instrument.stages import Level

from . import front_end, scheduler

_TOKENIZER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_FRONT, _CORE = "front end", "scheduler"

# The releases that the table is held against (tests/contracts).
RELEASES = ("0.5.15", "0.5.18", "0.5.20", "0.5.22", "0.5.23")

HOOK_POINTS: tuple[HookPoint, ...] = (
    HookPoint(
        f"{_TOKENIZER}.__init__",
        ("self", "server_args", "port_args"),
        Level.OFF,
        _FRONT,
        front_end.opens_recorder,
        "the process is a front end",
    ),
    HookPoint(
        f"{_SCHEDULER}.__init__",
        ("self", "server_args", "port_args"),
        Level.OFF,
        _CORE,
        scheduler.opens_recorder,
        "the process is a scheduler and a rank",
    ),
)
