"""Tests of how SGLang's model is taken apart and of what is put on its objects, without SGLang and PyTorch."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest
from unit.decoded import decoded_batch
from unit.rings import opened, read_all

from stagetrace.adapters import experts as experts_module
from stagetrace.adapters.sglang import layers
from stagetrace.adapters.sglang.worker import RANK
from stagetrace.instrument.around import Around
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT, Hook, HookPoint
from stagetrace.instrument.stages import BY_NAME, AttentionKind, Level

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stagetrace.exporters.drain import RingReader
    from stagetrace.instrument.recorder import Recorder

INSTANCE = 9


def made(name: str, *bases: type, **values: Any) -> Any:
    """An object of a class of that name, with these attributes."""
    one = type(name, bases, {})()
    vars(one).update(values)
    return one


class Tensor:
    """What the hooks ask of a tensor of rows."""

    def __init__(self, *shape: int):
        self.shape = shape
        self.nbytes = 2 * shape[0] * shape[-1]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Recorder, RingReader]]:
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        RANK.instance, RANK.rank = INSTANCE, 0
        RANK.start(4, 5, 1000)
        yield recorder, reader
        RANK.forget()


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    found: Any = types.ModuleType("torch")
    found.compiling = found.capturing = False
    found.compiler = types.SimpleNamespace(is_compiling=lambda: found.compiling)
    found.cuda = types.SimpleNamespace(is_initialized=lambda: True, is_current_stream_capturing=lambda: found.capturing)
    found.backends = types.SimpleNamespace(cuda=types.SimpleNamespace(is_built=lambda: True))
    found.distributed = types.SimpleNamespace(get_backend=lambda group: f"backend of {group}")
    monkeypatch.setitem(experts_module.sys.modules, "torch", found)
    return found


def hook_at(recorder: Recorder, level: Level = Level.OFF) -> Hook:
    return Hook(HookPoint("engine:work", (), level, "rank", lambda _: Around(), "nothing"), 0, recorder)


def segments(reader: RingReader) -> list[tuple[int, ...]]:
    """Stage, step and attributes of each."""
    return [(words[1], words[6], *words[7:]) for words in decoded_batch(read_all(reader)).segments]


# The model


@pytest.mark.parametrize(
    ("module", "latent", "kind"),
    [
        (made("RadixAttention", sliding_window_size=-1, is_cross_attention=False), False, AttentionKind.FULL),
        (made("RadixAttention", sliding_window_size=None), False, AttentionKind.FULL),
        (made("RadixAttention", sliding_window_size=128, is_cross_attention=False), False, AttentionKind.SLIDING),
        (made("RadixAttention", sliding_window_size=-1, is_cross_attention=True), False, AttentionKind.CROSS),
        (made("RadixAttention", sliding_window_size=-1, is_cross_attention=False), True, AttentionKind.MLA),
        (made("Own", type("RadixLinearAttention", (), {})), False, AttentionKind.LINEAR),
        (made("MambaMixer2"), False, AttentionKind.MAMBA),
    ],
)
def test_kinds_of_attention(module: Any, latent: bool, kind: AttentionKind):
    assert layers.attention_kind(module, latent) is kind


def test_dense_blocks_and_shared_experts():
    experts = made("DeepEPMoE", type("FusedMoE", (), {}))
    modules = [
        ("", made("Model")),
        ("model.layers.0.mlp", dense := made("LlamaMLP")),
        ("model.layers.0.mlp.down_proj", made("Linear")),
        ("model.layers.1.mlp", made("SparseBlock")),
        ("model.layers.1.mlp.shared_experts", shared := made("MLP")),
        ("model.layers.1.mlp.shared_experts.down_proj", made("Linear")),
        ("model.layers.1.mlp.experts", experts),
        ("model.layers.2.block_sparse_moe.shared_expert", other := made("MLP")),
        ("lm_head.mlp", made("MLP")),
    ]
    assert [*layers.blocks(modules)] == [
        ("mlp", 0, dense),
        ("shared_experts", 1, shared),
        ("shared_experts", 2, other),
    ]


@pytest.mark.parametrize(
    ("rows", "sizes", "dp_rank", "tokens", "own"),
    [
        (5, None, 0, 5, (0, 5)),
        (12, [5, 7], 0, 5, (0, 5)),
        (12, [5, 7], 1, 7, (5, 12)),
        (16, [8, 8], 1, 7, (8, 15)),  # padded to the longest
        (7, [5, 7], 1, 7, (0, 7)),  # not gathered: experts on other ranks are sent theirs
        (7, [0, 7], 1, 7, (0, 7)),
        (5, [5], 0, 5, (0, 5)),
    ],
)
def test_the_rows_of_this_rank(
    rows: int, sizes: list[int] | None, dp_rank: int, tokens: int, own: tuple[int, int]
) -> None:
    found = layers.own_rows(rows, sizes, dp_rank, tokens)
    assert (found.start, found.stop) == own


def test_the_layer_of_a_module():
    assert layers.layer_of("model.layers.3.mlp.topk", made("TopK", layer_id=7)) == 7
    assert layers.layer_of("model.layers.3.mlp.topk", made("TopK", layer_id=None)) == 3
    assert layers.layer_of("model.layers.3.mlp.topk", made("TopK")) == 3


def test_rows_of_what_experts_compute():
    assert layers.rows_of(Tensor(5, 256)) == 5
    assert layers.rows_of(Tensor(4, 16, 256)) == 64


# On objects


class Dispatcher:
    """SGLang's BaseDispatcher, as far as its hooks go."""

    def __init__(self) -> None:
        self.called: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("register_"):
            raise AttributeError(name)
        return self.called.setdefault(name.removeprefix("register_").removesuffix("_hook"), []).append

    def dispatch(self, hidden: Tensor) -> None:
        for hook in self.called["pre_dispatch"]:
            assert hook(self, hidden, "choices") is None
        for hook in self.called["post_dispatch"]:
            assert hook(self, "what the experts get") is None

    def combine(self, hidden: Tensor) -> None:
        for hook in self.called["pre_combine"]:
            assert hook(self, "what the experts gave") is None
        for hook in self.called["post_combine"]:
            assert hook(self, hidden) is None


def listened(recorder: Recorder, level: Level = Level.OFF) -> tuple[Dispatcher, dict[str, Hook]]:
    dispatcher = Dispatcher()
    others = {door: hook_at(recorder, level) for doors in layers.DOORS.values() for door in doors}
    for stage, doors in layers.DOORS.items():
        assert layers._listen(others, dispatcher, stage, doors, 3)
    return dispatcher, others


def test_dispatch_and_combine_are_a_segment_each(pair: tuple[Recorder, RingReader], torch: Any):
    recorder, reader = pair
    dispatcher, others = listened(recorder)
    dispatcher.dispatch(Tensor(5, 8))
    dispatcher.combine(Tensor(6, 8))
    RANK.forget()
    dispatcher.dispatch(Tensor(7, 8))  # a dummy run
    assert segments(reader) == [
        (BY_NAME["expert_dispatch"].id, 4, 3, 5, 80, 0, 0, 0, 0, 0),
        (BY_NAME["expert_combine"].id, 4, 3, 6, 96, 0, 0, 0, 0, 0),
    ]
    assert {hook.objects for hook in others.values()} == {1}


@pytest.mark.parametrize("why", ["compiling", "capturing", "level"])
def test_nothing_is_recorded(why: str, pair: tuple[Recorder, RingReader], torch: Any):
    recorder, reader = pair
    dispatcher, _ = listened(recorder, Level.KERNEL if why == "level" else Level.OFF)
    if why != "level":
        setattr(torch, why, True)
    dispatcher.dispatch(Tensor(5, 8))
    assert not segments(reader)


def test_an_error_stays_in_the_hook(pair: tuple[Recorder, RingReader], torch: Any):
    recorder, reader = pair
    dispatcher, others = listened(recorder)
    for _ in range(ERRORS_UNTIL_OUT + 1):
        dispatcher.dispatch(object())  # type: ignore[arg-type]
    assert {hook.status for hook in others.values()} == {"waiting", "out"}
    assert not segments(reader)


class Counting:
    """Takes counts, or fails."""

    def __init__(self, fails: bool = False):
        self.calls: list[tuple[Any, ...]] = []
        self.fails = fails

    def count(self, *given: Any) -> None:
        self.calls.append(given)
        if self.fails:
            raise RuntimeError("ours")


class Choices:
    """A tensor of expert numbers, of which parts are asked for."""

    def __init__(self, rows: int):
        self.shape = (rows, 4)

    def __getitem__(self, part: Any) -> Any:
        return ("columns", part[1]) if isinstance(part, tuple) else ("rows", part)


def test_a_routers_result_is_counted_and_handed_on(pair: tuple[Recorder, RingReader], torch: Any):
    recorder, _ = pair
    result = types.SimpleNamespace(topk_ids=Choices(5))
    counts: Any = Counting(fails=True)
    hook = hook_at(recorder)
    forward = layers.counted(hook, 3, counts, lambda *_, **__: result, 2, None)
    for _ in range(ERRORS_UNTIL_OUT + 2):
        assert forward("hidden", router_logits="logits") is result
    assert counts.calls == [(3, ("columns", slice(None, 2)), None)] * ERRORS_UNTIL_OUT
    assert hook.status == "out"


def test_choices_that_are_not_to_be_seen_are_not_counted(pair: tuple[Recorder, RingReader], torch: Any):
    recorder, _ = pair
    counts: Any = Counting()
    bypassed = object()  # the experts' kernel chooses
    assert layers.counted(hook_at(recorder), 3, counts, lambda: bypassed, 2, None)() is bypassed
    result = types.SimpleNamespace(topk_ids=Choices(5))
    layers.counted(hook_at(recorder, Level.KERNEL), 3, counts, lambda: result, 2, None)()
    torch.compiling = True
    layers.counted(hook_at(recorder), 3, counts, lambda: result, 2, None)()
    assert not counts.calls


def test_routers_that_hand_everything_on_are_timed_too(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair

    def anything(*args: Any, **kwargs: Any) -> None: ...

    around: Any = layers._routing(recorder, anything, 3)
    around.after((Tensor(5, 8),), {}, 1, 2)
    around.after((), {"hidden_states": Tensor(6, 8)}, 3, 4)
    assert [words[2:4] for words in segments(reader)] == [(3, 5), (3, 6)]


def test_logits_are_of_the_positions_that_were_asked_for(pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    around: Any = layers.logits(hook_at(recorder))
    around.after(types.SimpleNamespace(next_token_logits=Tensor(2, 1024)), 1, 2)
    around.after(types.SimpleNamespace(next_token_logits=None), 3, 4)
    assert [words[:3] for words in segments(reader)] == [
        (BY_NAME["logits"].id, 4, 2),
        (BY_NAME["logits"].id, 4, 0),
    ]


# Groups


def parallel(tp_size: int, attn_dp_size: int) -> Any:
    return types.SimpleNamespace(tp_size=tp_size, attn_dp_size=attn_dp_size)


@pytest.mark.parametrize(
    ("name", "ranks", "tp_size", "attn_dp_size", "shown"),
    [
        ("tp:0", [0, 1, 2, 3], 4, 1, "tp:0 (ranks 0-3)"),
        ("tp:0", [0, 1, 2, 3], 4, 2, "dp tp:0 (ranks 0-3)"),
        ("attention_tp:0", [2, 3], 4, 2, "attention_tp:0 (ranks 2-3)"),
        ("pp:1", [1, 5], 4, 2, "pp:1 (ranks 1,5)"),
    ],
)
def test_a_groups_name_says_whether_several_schedulers_steps_meet(
    name: str, ranks: list[int], tp_size: int, attn_dp_size: int, shown: str
):
    coordinator = types.SimpleNamespace(unique_name=name, ranks=ranks)
    assert layers.group_name(coordinator, parallel(tp_size, attn_dp_size)) == shown


def test_a_group_is_named_when_a_step_first_uses_it(
    pair: tuple[Recorder, RingReader], torch: Any, monkeypatch: pytest.MonkeyPatch
):
    context: Any = types.ModuleType("sglang.srt.runtime_context")
    context.get_parallel = lambda: parallel(2, 1)
    for name, module in (("sglang", types.ModuleType("sglang")), ("sglang.srt", types.ModuleType("sglang.srt"))):
        monkeypatch.setitem(experts_module.sys.modules, name, module)
    monkeypatch.setitem(experts_module.sys.modules, "sglang.srt.runtime_context", context)
    coordinator: Any = made("GroupCoordinator", unique_name="tp:0", ranks=[0, 1], world_size=2, device_group="devices")
    RANK.forget()
    group = layers.group_of(coordinator)  # while the groups are built
    assert (group.name, group.algorithm, group.alone) == ("", "", False)
    RANK.start(4, 5, 1000)
    assert layers.group_of(coordinator) is group
    assert (group.name, group.algorithm) == ("tp:0 (ranks 0-1)", "backend of devices")
