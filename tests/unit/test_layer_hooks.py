"""Tests of what the layer hooks of all engines share, and of how vLLM's model is taken apart; without either."""

from __future__ import annotations

import threading
import types
from typing import TYPE_CHECKING, Any

import pytest
from unit.decoded import decoded_batch
from unit.rings import opened, read_all

from stagetrace.adapters import experts as experts_module
from stagetrace.adapters.collectives import Collectives, Group, size_of
from stagetrace.adapters.experts import chained, contained, packed, width_for
from stagetrace.adapters.layers import Within, timed, timed_within
from stagetrace.adapters.rank import layer_index, ranges
from stagetrace.adapters.vllm import compile_key, layers
from stagetrace.instrument.around import Around, wrap
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT, Hook, HookPoint
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.records import Text
from stagetrace.instrument.stages import BY_NAME, AttentionKind, Collective, Level

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stagetrace.exporters.drain import RingReader

INSTANCE = 9


class Tensor:
    """What the hooks ask of a tensor."""

    def __init__(self, rows: int, size: int = 0):
        self.shape = (rows, 4)
        self.nbytes = size or rows * 8


class Rank:
    """A rank in a step."""

    rank, instance, step, tokens = 0, INSTANCE, 1, 5


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Recorder, RingReader]]:
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        yield recorder, reader


def hooked(recorder: Recorder, function: Callable[..., Any], around: Around, level: Level = Level.OFF) -> Any:
    point = HookPoint("engine:work", (), level, "worker", lambda _: around, "nothing")
    return wrap(function, around, Hook(point, 0, recorder))  # type: ignore[arg-type]


def segments(reader: RingReader) -> list[tuple[int, ...]]:
    """Stage, step and attributes of each."""
    return [(words[1], words[6], *words[7:]) for words in decoded_batch(read_all(reader)).segments]


# Names


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.attn", 3),
        ("model.layers.12.mlp.experts", 12),
        ("transformer.h.0.attn", 0),
        ("visual.blocks.7.mlp", 7),
        ("model.decoder.2.block.1.mlp", 2),
        ("model.embed_tokens", -1),
        ("layers", -1),
        ("", -1),
    ],
)
def test_layer_of_a_name(name: str, layer: int):
    assert layer_index(name) == layer


def test_ranges_in_words():
    assert ranges([]) == ""
    assert ranges([8, 0, 1, 2, 3, 3]) == "0-3,8"


# Segments


def test_a_call_is_one_segment_with_its_layer_and_tokens(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    rank: Any = Rank()
    hidden = Tensor(5)
    for stage, words in (("embed", ()), ("mlp", (3,)), ("attention", (3, int(AttentionKind.MLA)))):
        work = hooked(recorder, lambda q: q, timed(recorder, rank, stage, "q", *words))
        assert work(hidden) is hidden
    rank.step = 0  # a dummy run, say
    assert work(hidden) is hidden
    found = segments(reader)
    assert [(stage, *words[:3]) for stage, _, *words in found] == [
        (BY_NAME["embed"].id, 5, 0, 0),
        (BY_NAME["mlp"].id, 3, 5, 0),
        (BY_NAME["attention"].id, 3, 3, 5),
    ]


def test_the_layer_is_that_of_the_thread(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    within = Within()
    rank: Any = Rank()

    def work(x: Tensor) -> Tensor:
        other = threading.Thread(target=within.enter, args=(8,))  # the other half of the batch
        other.start()
        other.join()
        return x

    hooked_work = hooked(recorder, work, timed_within(recorder, rank, within, "expert_dispatch", "x"))
    for layer in (-1, 7):
        if layer >= 0:
            within.enter(layer)
        hooked_work(Tensor(5, 40))
    assert [words[2:5] for words in segments(reader)] == [(-1, 5, 40), (7, 5, 40)]


# Collectives


class Coordinator:
    """Two ranks and their operations."""

    def __init__(self, name: str, alone: bool = False):
        self.group = Group(name, alone, "gloo")

    def dispatch(self, x: Any) -> Any:
        return [self.all_gather(x), self.all_gather(x)]

    def all_gather(self, x: Any) -> Any:
        if x == "fails":
            raise KeyError("from the engine")
        return x

    def send(self, x: Any) -> Any:
        return x


def coordinators(recorder: Recorder, rank: Any, level: Level = Level.OFF) -> type[Coordinator]:
    """The class with hooks on it."""
    collectives = Collectives(recorder, rank)
    found = type("Hooked", (Coordinator,), {})
    for name, op in (
        ("dispatch", Collective.DISPATCH),
        ("all_gather", Collective.ALL_GATHER),
        ("send", Collective.SEND),
    ):
        around = collectives.around(op, lambda at: at.group, "self", "x")
        setattr(found, name, hooked(recorder, getattr(Coordinator, name), around, level))
    return found


def test_collectives_have_op_group_bytes_algorithm_and_number(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    group = coordinators(recorder, Rank())("tp:0")
    x = Tensor(3, 24)
    group.all_gather(x)
    group.send(x)
    group.all_gather(x)
    batch = read_all(reader)
    tp, gloo = recorder.handle("tp:0"), recorder.handle("gloo")
    found = [words[7:12] for words in decoded_batch(batch).segments]
    assert found == [
        (Collective.ALL_GATHER, tp, 24, gloo, 1),
        (Collective.SEND, tp, 24, gloo, 0),
        (Collective.ALL_GATHER, tp, 24, gloo, 3),
    ]
    assert decoded_batch(batch).texts == [(tp, Text.NAME, "tp:0"), (gloo, Text.NAME, "gloo")]


def test_nested_operations_count_once_and_number_all_the_same(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    rank = Rank()
    group = coordinators(recorder, rank)("ep:0")
    group.dispatch(Tensor(1))
    group.all_gather(Tensor(1))
    assert [(op, number) for _, _, op, _, _, _, number, *_ in segments(reader)] == [
        (Collective.DISPATCH, 1),
        (Collective.ALL_GATHER, 4),
    ]


@pytest.mark.parametrize("level", [Level.OFF, Level.KERNEL], ids=["recording", "below the level"])
def test_numbers_go_on_at_every_level(level: Level, pair: tuple[Recorder, RingReader]):
    recorder, _ = pair
    group = coordinators(recorder, Rank(), level)("ep:0")
    group.dispatch(Tensor(1))
    group.all_gather(Tensor(1))
    assert group.group.sequence == 4


def test_an_operation_that_raises_hides_none_of_the_next_step(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    rank = Rank()
    group = coordinators(recorder, rank)("tp:0")
    with pytest.raises(KeyError):
        group.all_gather("fails")
    rank.step = 2
    group.all_gather(Tensor(1))
    assert [step for _, step, *_ in segments(reader)] == [2]


def test_a_group_of_one_and_a_time_outside_steps_record_nothing(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    rank = Rank()
    hooked_class = coordinators(recorder, rank)
    alone, group = hooked_class("pp:0", alone=True), hooked_class("tp:0")
    alone.all_gather(Tensor(1))
    rank.step = 0
    group.all_gather(Tensor(1))
    assert not segments(reader) and group.group.sequence == 1


def test_what_carried_it_out(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    rank: Any = Rank()
    collectives = Collectives(recorder, rank)
    fast = hooked(recorder, lambda x: x if x.nbytes < 10 else None, collectives.carried_out_by("custom"))
    around = collectives.around(Collective.ALL_REDUCE, lambda at: at.group, "self", "x")
    all_reduce = hooked(recorder, lambda self, x: fast(x) or x, around)
    group = Coordinator("tp:0")
    for size in (8, 80):
        all_reduce(group, Tensor(1, size))
    assert [words[5] for words in segments(reader)] == [recorder.handle("custom"), recorder.handle("gloo")]


def test_sizes():
    one = Tensor(1, 5)
    assert size_of(one) == 5 and size_of([one, (one, one)]) == 15 and size_of({"a": one, "b": 3, "c": None}) == 5
    assert size_of(None) == size_of("text") == size_of(object()) == 0


# Experts


def test_counts_as_records_have_them():
    assert [width_for(most) for most in (0, 255, 256, 65535, 65536)] == [1, 1, 2, 2, 4]
    assert (
        packed([1, 255], 1) == b"\x01\xff" and packed([256], 2) == b"\x00\x01" and packed([1 << 20], 4) == b"\0\0\x10\0"
    )


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    found: Any = types.ModuleType("torch")
    found.compiling = False
    found.compiler = types.SimpleNamespace(is_compiling=lambda: found.compiling)
    found.cuda = types.SimpleNamespace(is_current_stream_capturing=lambda: False)
    monkeypatch.setitem(experts_module.sys.modules, "torch", found)
    return found


class Counting:
    """Takes counts, or fails."""

    def __init__(self, fails: bool = False):
        self.calls: list[tuple[Any, ...]] = []
        self.fails = fails

    def count(self, *given: Any) -> None:
        self.calls.append(given)
        if self.fails:
            raise RuntimeError("ours")


def counting_hook(recorder: Recorder, level: Level = Level.OFF) -> Hook:
    return Hook(HookPoint("engine:chosen", (), level, "worker", lambda _: Around(), "experts"), 0, recorder)


def test_the_callback_before_is_kept_whatever_becomes_of_ours(pair: tuple[Recorder, RingReader], torch: Any):
    recorder, _ = pair
    theirs: list[Any] = []
    counts: Any = Counting(fails=True)
    hook = counting_hook(recorder)
    callback = chained(hook, 3, counts, lambda rows: f"padding of {rows}", theirs.append)
    chosen = Tensor(5)
    for _ in range(ERRORS_UNTIL_OUT + 2):
        callback(chosen)
    assert theirs == [chosen] * (ERRORS_UNTIL_OUT + 2)
    assert counts.calls == [(3, chosen, "padding of 5")] * ERRORS_UNTIL_OUT
    assert hook.status == "out"
    assert chained(hook, 3, counts, lambda rows: None, None)(chosen) is None


def test_no_choice_is_counted_below_the_level_or_while_a_compiler_traces(pair: tuple[Recorder, RingReader], torch: Any):
    recorder, _ = pair
    counts: Any = Counting()
    chained(counting_hook(recorder, Level.KERNEL), 3, counts, lambda rows: None, None)(Tensor(1))
    torch.compiling = True
    chained(counting_hook(recorder), 3, counts, lambda rows: None, None)(Tensor(1))
    assert not counts.calls


def test_what_runs_within_another_hook_has_its_own_errors(pair: tuple[Recorder, RingReader]):
    recorder, _ = pair
    hook = counting_hook(recorder)
    calls = []

    def fails() -> None:
        calls.append(1)
        raise RuntimeError("ours")

    called = contained(hook, fails)
    for _ in range(ERRORS_UNTIL_OUT + 3):
        called()
    assert len(calls) == ERRORS_UNTIL_OUT and hook.status == "out"


# vLLM's model


def made(name: str, *bases: type, **values: Any) -> Any:
    """An object of a class of that name, with these attributes."""
    one = type(name, bases, {})()
    vars(one).update(values)
    return one


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (made("Attention", sliding_window=None), AttentionKind.FULL),
        (made("Attention", sliding_window=128), AttentionKind.SLIDING),
        (made("ChunkedLocalAttention"), AttentionKind.SLIDING),
        (made("MLAAttention"), AttentionKind.MLA),
        (made("CrossAttention", sliding_window=None), AttentionKind.CROSS),
        (
            made("Mixer2", type("MambaBase", (), {}), mamba_type=types.SimpleNamespace(name="MAMBA2")),
            AttentionKind.MAMBA,
        ),
        (
            made("Gdn", type("MambaBase", (), {}), mamba_type=types.SimpleNamespace(name="GDN_ATTN")),
            AttentionKind.LINEAR,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, AttentionKind) else "",
)
def test_kinds_of_attention(layer: Any, kind: AttentionKind):
    assert layers.attention_kind(layer) is kind


class Impl:
    def forward(self, layer: Any, query: Any, key: Any) -> None: ...


class Mixer:
    def conv_ssm_forward(self, projected_states: Any, output: Any) -> None: ...

    def forward_impl(self, positions: Any) -> None:
        """Takes nothing with the tokens in it."""


class MLAAttention:
    impl = Impl()

    def forward_impl(self, q: Any, kv: Any) -> None: ...


def test_what_computes_a_layers_attention():
    attention = made("Attention", impl=Impl())
    assert [*layers.attention_calls(attention)] == [(attention.impl, "forward", "query")]
    mixer = Mixer()
    assert [*layers.attention_calls(mixer)] == [(mixer, "conv_ssm_forward", "projected_states")]
    mla = MLAAttention()
    assert [*layers.attention_calls(mla)] == [(mla, "forward_impl", "q")]
    assert [*layers.attention_calls(object())] == []


def test_dense_blocks_and_shared_experts():
    shared = made("MLP", marked=1)
    modules = [
        ("", made("Model")),
        ("model.layers.0.mlp", dense := made("LlamaMLP")),
        ("model.layers.0.mlp.down_proj", made("Linear")),
        ("model.layers.1.mlp", made("SparseBlock")),
        ("model.layers.1.mlp.shared_expert", shared),
        ("model.layers.1.mlp.experts", made("MoERunner")),
        ("model.layers.1.mlp.experts._shared_experts", made("SharedExperts", _layer=shared)),
        ("lm_head.mlp", made("MLP")),
    ]
    assert [*layers.blocks(modules)] == [("mlp", 0, dense), ("shared_experts", 1, shared)]


def test_what_is_compiled():
    by_decorator = [("", made("A", do_not_compile=True)), ("model", made("B", do_not_compile=False)), ("x", made("C"))]
    assert layers.compiled_within(by_decorator) == ("model.",)
    as_a_whole = [("", made("A", _compiled_call_impl=print)), ("model", made("B", _compiled_call_impl=None))]
    assert layers.compiled_within(as_a_whole) == ("",)


def test_experts_behind_an_operator_are_opaque():
    operator = type("OpOverloadPacket", (), {"__module__": "torch._ops"})()
    assert layers.is_opaque(made("MoERunner", _forward_entry=operator))
    assert not layers.is_opaque(made("MoERunner", _forward_entry=lambda hidden_states: None))
    assert not layers.is_opaque(made("MoERunner")), "the way in is not known"


def test_a_groups_name_has_its_ranks():
    coordinator = types.SimpleNamespace(
        unique_name="tp:0", ranks=[0, 1, 2], world_size=3, device_communicator=None, torch_distributed_backend="nccl"
    )
    group = layers.group_of(coordinator)
    assert (group.name, group.alone, group.algorithm) == ("tp:0 (ranks 0-2)", False, "nccl")
    assert layers.group_of(coordinator) is group
    coordinator.device_communicator = types.SimpleNamespace(dist_module=made("_CPUSHMDistributed"))
    assert layers.algorithm_of(coordinator) == "shared memory"


def test_a_choice_past_a_router_is_timed_and_counted(pair: tuple[Recorder, RingReader], monkeypatch: Any):
    recorder, reader = pair
    counted: list[tuple[Any, ...]] = []

    class Counts:
        count = staticmethod(lambda *given: counted.append(given))

    rank: Any = Rank()
    monkeypatch.setattr(layers, "RANK", rank)
    monkeypatch.setattr(layers._OnCpu, "counts", Counts)
    layers.WITHIN.enter(3)
    hidden, chosen = Tensor(5), Tensor(5)
    around = layers.chosen_on_cpu(types.SimpleNamespace(recorder=recorder))  # type: ignore[arg-type]
    select_experts = hooked(recorder, lambda hidden_states: (None, chosen), around)
    assert select_experts(hidden) == (None, chosen)
    rank.step = 0  # a dummy run
    select_experts(hidden)
    assert counted == [(3, chosen, None)]
    assert [(stage, step, *words[:2]) for stage, step, *words in segments(reader)] == [
        (BY_NAME["moe_route"].id, 1, 3, 5)
    ]


# vLLM's compile key


@pytest.mark.parametrize(
    ("before", "found", "after"),
    [
        ("mine,yours", ("mine", "yours", "stagetrace"), ("mine", "yours")),
        ("", ["stagetrace"], [""]),
        (None, ["mine", "stagetrace"], ["mine", "stagetrace"]),
        ("mine", None, None),
    ],
)
def test_the_compile_key_has_the_plugins_that_the_user_named(
    monkeypatch: pytest.MonkeyPatch, before: str | None, found: Any, after: Any
):
    if before is not None:
        monkeypatch.setenv("STAGETRACE_VLLM_PLUGINS", before)
    factors = {"VLLM_PLUGINS": found, "OTHER": 1}
    work = hooked(Recorder(), lambda: factors, compile_key.factors_gathered(None))  # type: ignore[arg-type]
    assert work() == {"VLLM_PLUGINS": after, "OTHER": 1}
