"""The hook points in SGLang: which function, what the handler relies on, from which level on, and what it gives.

SGLang's own HookRegistry is not used. It imports every module that it patches, in every process (the tokenizer and the
detokenizer would import the model), looks through all loaded modules for each target, and lets a hook's error through.
The plugin's door is: from there modules are patched when the engine imports them, so each process has what it runs.
"""

from __future__ import annotations

from stagetrace.instrument.hooks import HookPoint
from stagetrace.instrument.stages import Level

from ..http import HTTP_POINTS
from . import front_end, scheduler

_TOKENIZER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
_CONTROLLER = "sglang.srt.managers.data_parallel_controller:DataParallelController"
_DETOKENIZER = "sglang.srt.managers.detokenizer_manager:DetokenizerManager"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_FRONT, _CORE = "front end", "scheduler"

# The releases that the table is held against (tests/contracts).
RELEASES = ("0.5.15", "0.5.18", "0.5.20", "0.5.22", "0.5.23")

HOOK_POINTS: tuple[HookPoint, ...] = (
    HookPoint(
        f"{_TOKENIZER}.__init__", ("self",), Level.OFF, _FRONT, front_end.opens_recorder, "the process is a front end"
    ),
    HookPoint(
        f"{_TOKENIZER}._send_one_request",
        ("self", "tokenized_obj"),
        Level.REQUEST,
        _FRONT,
        front_end.send_one_request,
        "arrival, tokenize, dispatch, ids, trace context",
    ),
    HookPoint(
        f"{_TOKENIZER}._send_batch_request",
        ("self", "tokenized_objs"),
        Level.REQUEST,
        _FRONT,
        front_end.send_batch_request,
        "the same of several requests in one message",
    ),
    HookPoint(
        "sglang.srt.managers.io_struct:GenerateReqInput.regenerate_rid",
        ("self",),
        Level.REQUEST,
        _FRONT,
        front_end.copy_for_sampling,
        "which request the samples belong to (n > 1)",
    ),
    HookPoint(
        f"{_TOKENIZER}._handle_batch_output",
        ("self", "recv_obj"),
        Level.REQUEST,
        _FRONT,
        front_end.handle_batch_output,
        "first token in the front end, finish reason and token counts as the client gets them",
    ),
    HookPoint(
        f"{_TOKENIZER}._handle_abort_req",
        ("self", "recv_obj"),
        Level.REQUEST,
        _FRONT,
        front_end.handle_abort,
        "requests that were given up while they waited",
    ),
    HookPoint(
        f"{_TOKENIZER}.abort_request",
        ("self", "rid"),
        Level.REQUEST,
        _FRONT,
        front_end.abort_request,
        "clients that went away",
    ),
    HookPoint(
        f"{_TOKENIZER}._release_req_states_on_failure",
        ("self", "request_states"),
        Level.REQUEST,
        _FRONT,
        front_end.request_failed,
        "requests that were refused",
    ),
    HookPoint(
        f"{_TOKENIZER}._tokenize_texts",
        ("self", "texts"),
        Level.STEP,
        _FRONT,
        front_end.tokenize_texts,
        "tokenize",
    ),
    HookPoint(
        f"{_TOKENIZER}._dispatch_to_scheduler", ("self", "obj"), Level.STEP, _FRONT, front_end.dispatch, "dispatch"
    ),
    *HTTP_POINTS,
    HookPoint(
        f"{_CONTROLLER}.__init__",
        ("self",),
        Level.OFF,
        "data-parallel controller",
        front_end.opens_controller,
        "the process is a data-parallel controller",
    ),
    HookPoint(
        f"{_CONTROLLER}.dispatching_with_trace",
        ("self", "req"),
        Level.STEP,
        "data-parallel controller",
        front_end.dispatch,
        "dispatch to a data-parallel rank",
    ),
    HookPoint(
        f"{_DETOKENIZER}.__init__",
        ("self",),
        Level.OFF,
        "detokenizer",
        front_end.opens_detokenizer,
        "the process is a detokenizer",
    ),
    HookPoint(
        f"{_DETOKENIZER}.handle_batch_token_id_out",
        ("self", "recv_obj"),
        Level.STEP,
        "detokenizer",
        front_end.detokenize,
        "detokenize",
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
