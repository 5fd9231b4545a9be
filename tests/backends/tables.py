"""Tables of a session made by hand, for tests of what reads them: a builder, and one realistic session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stagetrace.exporters.session import TABLES, Manifest, Process
from stagetrace.instrument import ids
from stagetrace.instrument.stages import BY_NAME, STEP_COMPOSITION, phase

MS = 1_000_000
KEY = bytes(range(16))


class Builder:
    """Rows in the schemas of exporters/session.py; what is not given is null, and zero where null is not allowed."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        self._sequence: dict[int, int] = {}

    def add(self, table: str, **columns: Any) -> dict[str, Any]:
        unknown = set(columns) - set(TABLES[table].names)
        assert not unknown, f"no columns of {table}: {unknown}"
        zeros = {pa.int64(): 0, pa.int32(): 0, pa.int16(): 0, pa.int8(): 0, pa.string(): "", pa.bool_(): False}
        row = {
            field.name: columns.get(field.name, None if field.nullable else zeros.get(field.type))
            for field in TABLES[table]
        }
        self.rows[table].append(row)
        return row

    def request(self, name: str, **columns: Any) -> int:
        """A request by the engine's id of it; without a trace id its own. Returns its handle."""
        handle = ids.handle(KEY, name)
        given = {
            "handle": handle,
            "request_id": name,
            "trace_id": ids.request_trace_id(KEY, handle).hex(),
            "trace_flags": 1,
            "status": "finished",
            "finish": "stop",
        }
        self.add("requests", **(given | columns))
        return handle

    def state(
        self, stage: str, handle: int, begin: int, end: int, *, instance: int | None = None, **named: Any
    ) -> None:
        """A state; attributes of the stage by their names."""
        step = named.pop("step", None)
        self.add(
            "states",
            handle=handle,
            stage=BY_NAME[stage].id,
            begin_ns=begin,
            end_ns=end,
            instance=instance,
            step=step,
            **words(stage, named),
        )

    def step(self, instance: int, step: int, begin: int, end: int, **columns: Any) -> None:
        composition = {attribute.name: columns.get(attribute.name, 0) for attribute in STEP_COMPOSITION}
        given = {
            "instance": instance,
            "step": step,
            "phase": str(phase(composition["prefill_tokens"], composition["decode_tokens"])),
            "status": "complete",
            "begin_ns": begin,
            "scheduled_ns": begin,
            "end_ns": end,
            "ranks_expected": 1,
            "ranks_reported": 1,
        }
        self.add("steps", **(given | composition | columns))

    def segment(
        self,
        stage: str,
        process: int,
        begin: int,
        end: int,
        *,
        parent: int | None = None,
        of: tuple[int, int, str] | None = None,
        **named: Any,
    ) -> int:
        """A segment; `of`: instance, step and phase; `record`: its sequence number, which is returned.

        Attributes of the stage by their names.
        """
        sequence = named.pop("record", self._sequence.get(process, 0))
        self._sequence[process] = max(self._sequence.get(process, 0), sequence + 1)
        instance, step, its_phase = of or (None, None, None)
        self.add(
            "segments",
            process=process,
            sequence=sequence,
            thread=process * 10,
            stage=BY_NAME[stage].id,
            begin_ns=begin,
            end_ns=end,
            self_ns=end - begin,
            parent=parent,
            instance=instance,
            step=step,
            phase=its_phase,
            **words(stage, named),
        )
        return sequence

    def tables(self) -> dict[str, pa.Table]:
        made = {name: pa.Table.from_pylist(self.rows[name], schema=schema) for name, schema in TABLES.items()}
        for name, table in made.items():
            for field in table.schema:
                assert field.nullable or not table.column(field.name).null_count, f"{name}.{field.name} is null"
        return made


def words(stage: str, named: dict[str, int]) -> dict[str, int]:
    """The columns a0, a1 ... of a stage's attributes by their names."""
    names = [attribute.name for attribute in BY_NAME[stage].attributes]
    return {f"a{names.index(name)}": value for name, value in named.items()}


@dataclass
class Serving:
    """One engine with a front end, a scheduler and a worker that served three requests in four steps."""

    tables: dict[str, pa.Table]
    manifest: Manifest
    begin: int  # monotonic ns; everything else is relative to it
    wall: int  # wall ns of `begin`
    instance: int
    front_end: int
    scheduler: int
    worker: int
    traced: int  # handle: came with a traceparent, finished; its prompt was computed in two chunks
    aborted: int  # handle: came without one, given up by the client
    unsampled: int  # handle: came with a traceparent that says not sampled
    left_out: dict[str, int]  # what an export leaves out, and why


TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
TRACE_STATE = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"


def serving() -> Serving:
    t = 5_000_000_000_000
    wall = 1_760_000_000_123_456_789
    instance = 0x1234567890ABCDEF
    front_end, scheduler, worker = 101, 102, 103
    build = Builder()

    traced = build.request(
        "cmpl-a-0",
        external_id="cmpl-a",
        trace_id=TRACE_ID,
        parent_span_id=PARENT_ID,
        trace_state=TRACE_STATE,
        instance=instance,
        prompt_tokens=900,
        output_tokens=3,
        cached_tokens=100,
        max_tokens=64,
        arrival_ns=t,
        dispatched_ns=t + 2 * MS,
        queued_ns=t + 3 * MS,
        scheduled_ns=t + 11 * MS,
        first_token_ns=t + 49 * MS,
        first_output_ns=t + 51 * MS,
        first_sent_ns=t + 52 * MS,
        last_token_ns=t + 89 * MS,
        last_output_ns=t + 91 * MS,
        last_sent_ns=t + 92 * MS,
        end_ns=t + 92 * MS,
        tokenize_ns=2 * MS,
        dispatch_ns=1 * MS,
        queue_ns=8 * MS,
        prefill_ns=38 * MS,
        decode_ns=40 * MS,
        output_ns=3 * MS,
    )
    build.state("request_tokenize", traced, t, t + 2 * MS, prompt_tokens=900, max_tokens=64)
    build.state("request_dispatch", traced, t + 2 * MS, t + 3 * MS, prompt_tokens=900)
    build.state("queue", traced, t + 3 * MS, t + 11 * MS, instance=instance, prompt_tokens=900)
    build.state("prefill", traced, t + 11 * MS, t + 49 * MS, instance=instance, step=1, cached_tokens=100)
    for step, context in ((1, 500), (2, 900)):
        begin = t + (10 + 20 * (step - 1)) * MS
        last = int(step == 2)
        build.state(
            "prefill_chunk",
            traced,
            begin,
            begin + 20 * MS,
            instance=instance,
            step=step,
            tokens=400,
            context=context,
            last=last,
        )
    build.state("decode", traced, t + 49 * MS, t + 89 * MS, instance=instance, step=3, output_tokens=3)
    build.state("output", traced, t + 89 * MS, t + 92 * MS, instance=instance, output_tokens=3)
    build.add("members", handle=traced, instance=instance, first_step=1, last_step=4)

    aborted = build.request(
        "cmpl-b-0",
        instance=instance,
        status="aborted",
        finish="abort",
        prompt_tokens=30,
        output_tokens=1,
        max_tokens=0,
        arrival_ns=t + 40 * MS,
        queued_ns=t + 41 * MS,
        scheduled_ns=t + 51 * MS,
        first_token_ns=t + 69 * MS,
        end_ns=t + 95 * MS,
        preemptions=1,
    )
    build.state("queue", aborted, t + 41 * MS, t + 51 * MS, instance=instance)
    build.state("prefill", aborted, t + 51 * MS, t + 69 * MS, instance=instance, step=3)
    build.state("decode", aborted, t + 69 * MS, t + 72 * MS, instance=instance, step=4)
    build.state("preempted", aborted, t + 72 * MS, t + 95 * MS, instance=instance, step=4)
    build.add("members", handle=aborted, instance=instance, first_step=3, last_step=4)

    unsampled = build.request(
        "cmpl-c-0",
        instance=instance,
        trace_id="0af7651916cd43dd8448eb211c80319c",
        parent_span_id="b7ad6b7169203331",
        trace_flags=0,
        arrival_ns=t,
        end_ns=t + 5 * MS,
    )
    build.state("queue", unsampled, t + 1 * MS, t + 5 * MS, instance=instance)

    compositions: list[dict[str, int]] = [
        {"prefill_requests": 1, "prefill_tokens": 400, "prefill_context": 500, "cached_tokens": 100, "waiting": 1},
        {"prefill_requests": 1, "prefill_tokens": 400, "prefill_context": 900},
        {"prefill_requests": 1, "prefill_tokens": 30, "decode_requests": 1, "decode_tokens": 1, "decode_context": 901},
        {"decode_requests": 2, "decode_tokens": 2, "decode_context": 933, "kv_usage": 250_000},
    ]
    for step, composition in enumerate(compositions, 1):
        begin = t + (10 + 20 * (step - 1)) * MS
        end = begin + 20 * MS
        build.step(
            instance,
            step,
            begin,
            end,
            process=scheduler,
            thread=1020,
            scheduled_ns=begin + MS,
            unattributed_ns=12_345,
            members=1 if step < 3 else 2,
            output_tokens=1,
            **composition,
        )
        of = (instance, step, str(phase(composition.get("prefill_tokens", 0), composition.get("decode_tokens", 0))))
        build.segment("schedule", scheduler, begin, begin + MS, of=of)
        execute = build.segment("execute", scheduler, begin + MS, end - MS, of=of)
        build.segment("grammar", scheduler, begin + 2 * MS, begin + 3 * MS, of=of, parent=execute)
        build.segment("update", scheduler, end - MS, end - 12_345, of=of)
        # The worker writes what is inside before what is around it, as a recorder does that writes at the end.
        around = 6 * step + 100
        forward = around - 1
        build.segment(
            "attention", worker, begin + 5 * MS, begin + 7 * MS, of=of, parent=forward, layer=0, kind=1, tokens=400
        )
        # The collector of garbage knows of no step: the segment around it does.
        build.segment(
            "gc_pause", worker, begin + 8 * MS, begin + 8 * MS + 77, parent=forward, generation=2, collected=9
        )
        build.segment(
            "forward",
            worker,
            begin + 4 * MS,
            begin + 15 * MS,
            of=of,
            parent=around,
            record=forward,
            rank=0,
            tokens=400,
        )
        build.segment("rank_step", worker, begin + 2 * MS, begin + 18 * MS, of=of, record=around, rank=0, tokens=400)
    between = build.segment("between", scheduler, t + 90 * MS, t + 91 * MS)
    build.segment("emit", scheduler, t + 90 * MS, t + 90 * MS + 500, parent=between)
    build.segment("idle", scheduler, t + 91 * MS, t + 99 * MS, reason=1)
    build.segment("detokenize", front_end, t + 50 * MS, t + 51 * MS, requests=1)
    load = build.segment("model_load", worker, t - 900 * MS, t - 100 * MS)
    build.segment("compile", worker, t - 500 * MS, t - 200 * MS, parent=load)

    manifest = Manifest(
        session="0123456789abcdef0123456789abcdef",
        host="node-7",
        # The wall clock was set back by a second in the middle of it all.
        anchors=[(t - 1000 * MS, wall - 1000 * MS), (t + 35 * MS, wall + 35 * MS - 1000 * MS)],
        processes=[
            Process(front_end, "api-4000-1.ring", "api", 4000, "node-7", wall, info={"engine": "vllm"}),
            Process(
                scheduler,
                "engine-4001-2.ring",
                "engine",
                4001,
                "node-7",
                wall,
                info={"engine": "vllm", "version": "0.32.0", "model": "Qwen/Qwen3-0.6B"},
            ),
            Process(worker, "worker-4002-3.ring", "worker", 4002, "node-7", wall, info={"engine": "vllm", "rank": 0}),
        ],
    )
    return Serving(
        build.tables(),
        manifest,
        t,
        wall,
        instance,
        front_end,
        scheduler,
        worker,
        traced,
        aborted,
        unsampled,
        {"requests_not_sampled": 1, "segments_without_step": 4},
    )
