"""Tests of the parts of a step's work: against sums by hand, and that ranks together do what one does alone."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.configs import ALL, DEEPSEEK_V3, GPT_OSS_120B, LLAMA_405B, MIXTRAL_8X7B, QWEN3_235B, QWEN3_NEXT_80B

from stagetrace.analysis.batch import Batch, Bound
from stagetrace.analysis.model_config import describe
from stagetrace.analysis.operations import FORMULAS, Latent, StepWork, distinct_experts, step_work
from stagetrace.analysis.sharding import BUS_FACTORS, Exchange, Sharding, distinct_ranks
from stagetrace.instrument.stages import BY_NAME

MIXED = Batch.of_requests([(512, 512), (200, 1000)], [(1, 700)] * 30 + [(4, 3000)] * 2)


def collectives(work: StepWork) -> dict[tuple[str, str], tuple[str, int, float, int]]:
    return {(each.stage, each.part): (each.op, each.ranks, float(each.bytes), each.times) for each in work.collectives}


@pytest.mark.parametrize("name", ALL)
def test_stages_are_of_the_vocabulary_and_parts_add_up(name: str):
    work = step_work(describe(ALL[name]), MIXED, Sharding.vllm(2, 1, 2, True), draft_tokens=2)
    assert all(stage in BY_NAME for stage in work.stages())
    for total in (work.operations, work.bytes, work.bus_bytes):
        assert total() == pytest.approx(sum(float(total(stage)) for stage in work.stages()))
    by_arithmetic = work.operations_by_arithmetic()
    assert sum(float(each) for each in by_arithmetic.values()) == pytest.approx(float(work.operations()))
    assert work.bytes(activations=True) > work.bytes()


@pytest.mark.parametrize("name", ALL)
def test_every_part_has_a_formula(name: str):
    """A line of the page's table, under the same stage; drafts have one for all their parts."""
    config = ALL[name] | ({"index_topk": 64, "index_n_heads": 4, "index_head_dim": 64} if name == "kimi_k2" else {})
    lines = {(each.stage, each.part) for each in FORMULAS}
    for work in step_work(describe(config), MIXED, draft_tokens=1).works:
        assert work.stage == "draft" or (work.stage, work.part.partition(",")[0]) in lines, work.part
    assert all(each.stage in BY_NAME and each.source for each in FORMULAS)


def test_llama_by_hand():
    """One request of 1000 tokens with 3000 cached before it: every term written out."""
    work = step_work(describe(LLAMA_405B), Batch.of_requests([(1000, 4000)]))
    tokens, layers, hidden = 1000, 126, 16384
    assert work.operations("forward") == 2 * tokens * layers * (2 * hidden * hidden + 2 * hidden * 8 * 128)
    assert work.operations("mlp") == 2 * tokens * layers * 3 * hidden * 53248
    assert work.operations("attention") == 4 * 128 * 128 * layers * (1000 * 3000 + 1000 * 1001 / 2)
    assert work.operations("logits") == 2 * hidden * 128256
    assert work.operations_by_arithmetic().keys() == {"bf16"}
    (attention,) = [each for each in work.of("attention") if "prefill" in each.part]
    assert attention.cache_read == 4000 * 516_096 and attention.cache_written == 1000 * 516_096
    assert work.bytes("mlp") == 2 * layers * 3 * hidden * 53248
    assert work.bytes("embed") == 2 * tokens * hidden
    assert work.bytes("logits") == 2 * hidden * 128256
    assert work.assumptions == () and work.collectives == ()


def test_a_step_without_tokens_is_nothing():
    work = step_work(describe(QWEN3_NEXT_80B), Batch.of_requests(), Sharding.vllm(2, 1, 2, True), draft_tokens=1)
    assert work.operations() == work.bytes(activations=True) == work.bus_bytes() == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_ranks_share_what_is_not_replicated(name: str, ranks: int):
    model = describe(ALL[name])
    alone = step_work(model, MIXED)
    shared = step_work(model, MIXED, Sharding.vllm(ranks))
    for stage in ("mlp", "expert_compute", "shared_experts", "logits"):
        gate = 2 * 2048 * float(MIXED.tokens) * 48 if stage == "shared_experts" and "next" in name else 0
        whole = float(alone.operations(stage)) - gate
        assert float(shared.operations(stage)) - gate == pytest.approx(whole / ranks, rel=1e-9), stage
    assert shared.operations("moe_route") == alone.operations("moe_route")  # on every rank
    attention = {each.part: float(each.operations) for each in shared.of("attention")}
    for each in alone.of("attention"):
        assert attention[each.part] == pytest.approx(float(each.operations) / ranks), each.part


def test_recorded_experts_are_those_of_one_data_parallel_rank():
    model = describe(MIXTRAL_8X7B)
    batch = Batch.of_requests(decode=[(1, 900)] * 2, distinct_experts=4.0)
    alone, two = (step_work(model, batch, Sharding.vllm(1, 1, data, True)) for data in (1, 2))
    read = [sum(float(each.weights) for each in work.of("expert_compute")) for work in (alone, two)]
    assert read[1] / read[0] == pytest.approx((8 * (1 - (1 - 4 / 8) ** 2) / 2) / 4)  # each rank has half of the experts


def test_kv_heads_fewer_than_ranks_are_replicated():
    model = describe(QWEN3_235B)  # 4 of them
    read = {
        ranks: sum(float(each.cache_read) for each in step_work(model, MIXED, Sharding.vllm(ranks)).works)
        for ranks in (1, 2, 4, 8)
    }
    assert read[1] == 2 * read[2] == 4 * read[4] and read[8] == read[4]
    latent = describe(DEEPSEEK_V3)
    alone, shared = (sum(float(w.cache_read) for w in step_work(latent, MIXED, Sharding.vllm(n)).works) for n in (1, 8))
    assert alone == shared


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_pipeline_stages_do_together_what_one_does(name: str, stages: int):
    model = describe(ALL[name])
    parts = [step_work(model, MIXED, Sharding(pipeline=stages), stage=each) for each in range(stages)]
    alone = step_work(model, MIXED)
    assert sum(float(part.operations()) for part in parts) == pytest.approx(float(alone.operations()))
    assert sum(float(part.bytes()) for part in parts) == pytest.approx(float(alone.bytes()))
    row = (model.hidden or 0) * 2 * float(MIXED.tokens)
    assert all(collectives(part)["collective", "pipeline"] == ("send", 2, 2 * row, 1) for part in parts[:-1])
    assert parts[-1].collectives == ()


def test_pipeline_layers_are_divided_as_vllm_does():
    """As vllm.distributed.utils.get_pp_indices: the last stage gets none of what is left over."""
    assert [Sharding(pipeline=4).layers(62, stage) for stage in range(4)] == [(0, 15), (15, 31), (31, 47), (47, 62)]
    with pytest.raises(ValueError, match="pipeline stage 4 of 4"):
        Sharding(pipeline=4).layers(62, 4)
    with pytest.raises(ValueError, match="tensor is 0"):
        Sharding(tensor=0)


def test_experts_spread_over_data_parallel_ranks():
    model = describe(DEEPSEEK_V3)
    tokens = float(MIXED.tokens)
    alone = step_work(model, MIXED)
    wide = step_work(model, MIXED, Sharding.vllm(2, 1, 8, True))
    # 8 times the tokens on 16 ranks: half a rank's
    assert float(wide.operations("expert_compute")) == pytest.approx(float(alone.operations("expert_compute")) / 2)
    touched = 256 * (1 - (1 - 8 / 256) ** (8 * tokens)) / 16
    expert = 3 * 7168 * 2048 + 3 * 56 * 16 * 4  # fp8, and a 32-bit scale for each block of 128 x 128
    assert float(wide.bytes("expert_compute")) == pytest.approx(58 * touched * expert)
    row = 7168 * 2
    found = collectives(wide)
    assert found["expert_dispatch", "dispatch"] == ("all_gather", 8, 8 * tokens * row, 58)
    assert found["expert_combine", "combine"] == ("reduce_scatter", 8, 8 * tokens * row, 58)
    assert found["collective", "attention"] == ("all_reduce", 2, tokens * row, 61)
    assert found["collective", "logits"][:2] == ("all_gather", 2)
    sent = step_work(model, MIXED, Sharding.vllm(1, 1, 16, True, Exchange.ALL_TO_ALL))
    op, ranks, size, times = collectives(sent)["expert_dispatch", "dispatch"]
    assert (op, ranks, times) == ("all_to_all", 16, 58)
    assert size == pytest.approx(tokens * row * distinct_ranks(256, 8, 16))


def test_distinct_ranks_by_trial():
    generator = random.Random(7)
    trials = [len({expert // 16 for expert in generator.sample(range(256), 8)}) for _ in range(4000)]
    assert distinct_ranks(256, 8, 16) == pytest.approx(np.mean(trials), rel=0.01)
    assert distinct_ranks(8, 8, 4) == 4 and distinct_ranks(8, 1, 8) == pytest.approx(1) and distinct_ranks(8, 2, 1) == 1


def test_distinct_experts_by_trial():
    generator = random.Random(7)
    for tokens in (1, 5, 40):
        trials = [
            len(set(itertools.chain(*(generator.sample(range(64), 6) for _ in range(tokens))))) for _ in range(2000)
        ]
        assert float(distinct_experts(64, 6, np.asarray(tokens))) == pytest.approx(np.mean(trials), rel=0.01)
        least, most = (float(distinct_experts(64, 6, np.asarray(tokens), bound)) for bound in (Bound.LEAST, Bound.MOST))
        assert least <= min(trials) and max(trials) <= most


@given(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), st.integers(1, 30))
def test_no_routing_touches_more_on_average(weights: list[float], tokens: int):
    """One expert a token with any probabilities: the even one is the most, as distinct_experts says."""
    shares = [weight / sum(weights) for weight in weights]
    touched = sum(1 - (1 - share) ** tokens for share in shares)
    assert touched <= float(distinct_experts(4, 1, np.asarray(float(tokens)))) + 1e-9


def test_recorded_experts_are_taken():
    model = describe(MIXTRAL_8X7B)
    counted = step_work(model, Batch.of_requests(decode=[(1, 50)] * 4, distinct_experts=3.0))
    assert counted.bytes("expert_compute") == 32 * 3 * 3 * 4096 * 14336 * 2
    assert counted.assumptions == ()
    guessed = step_work(model, Batch.of_requests(decode=[(1, 50)] * 4))
    assert float(guessed.bytes("expert_compute")) == pytest.approx(32 * 8 * (1 - 0.75**4) * 3 * 4096 * 14336 * 2)
    assert "which experts the tokens chose is not recorded" in guessed.assumptions[0]


def test_latent_attention_is_absorbed_in_decode():
    """DeepSeek-V3 decode: 128 heads over 512 + 64 and 512 numbers, 2 x 128 x 512 x (128 + 128) a token besides."""
    model = describe(DEEPSEEK_V3)
    work = step_work(model, Batch.of_requests(decode=[(1, 4000)]))
    assert work.operations("attention") == 61 * (2 * 128 * 1088 * 4000 + 2 * 512 * 128 * 256)
    assert sum(float(each.cache_read) for each in work.of("attention")) == 70_272 * 4000
    expanded = step_work(model, Batch.of_requests(decode=[(1, 4000)]), decode_form=Latent.EXPANDED)
    assert expanded.operations("attention") == 61 * (2 * 128 * 320 * 4000 + 2 * 512 * 128 * 256 * 4000)
    plain = 61 * 2 * 512 * 128 * 256  # absorbed the weights are a copy in bf16, expanded they are fp8
    assert sum(float(each.weights) for each in work.of("attention")) == plain
    assert sum(float(each.weights) for each in expanded.of("attention")) == pytest.approx(plain / 2, rel=1e-3)
    mixed = Batch.of_requests(prefill=[(8, 8)], decode=[(1, 4000)])
    both = sum(float(each.weights) for each in step_work(model, mixed).of("attention"))
    assert both == pytest.approx(1.5 * plain, rel=1e-3)
    whole = describe(DEEPSEEK_V3 | {"quantization_config": None})
    assert sum(float(each.weights) for each in step_work(whole, mixed).of("attention")) == plain
    assert work.operations_by_arithmetic("attention").keys() == {"bf16"}


def test_sparse_attention_sees_what_its_indexer_chooses():
    config = DEEPSEEK_V3 | {
        "model_type": "deepseek_v32",
        "index_topk": 2048,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "num_nextn_predict_layers": 0,
    }
    work = step_work(describe(config), Batch.of_requests(decode=[(1, 10_000)]))
    parts = {each.part: each for each in work.of("attention")}
    assert parts["latent attention, decode"].operations == 61 * 2 * 128 * 1088 * 2048
    assert parts["latent attention, decode"].cache_read == 70_272 * 2048
    assert parts["indexer, decode"].operations == 61 * 2 * 64 * 129 * 10_000
    assert parts["indexer, decode"].cache_read == 61 * 132 * 10_000


def test_windows_limit_what_is_read():
    model = describe(GPT_OSS_120B)
    parts = {each.part: each for each in step_work(model, Batch.of_requests(decode=[(1, 5000)])).of("attention")}
    assert parts["sliding attention, decode"].operations == 18 * 4 * 64 * 64 * 128
    assert parts["full attention, decode"].operations == 18 * 4 * 64 * 64 * 5000
    assert parts["sliding attention, decode"].cache_read == 18 * 2 * 8 * 64 * 2 * 128
    two = Batch.of_requests(decode=[(1, 100), (1, 5000)])
    bounds = [float(step_work(model, two, bound=bound).operations("attention")) for bound in Bound]
    assert bounds[0] < bounds[2] and "a window of 128 tokens" in step_work(model, two).assumptions[0]


def test_drafts_are_in_a_stage_of_their_own():
    model = describe(DEEPSEEK_V3)
    batch = Batch.of_requests(decode=[(1, 100)] * 8)
    plain, one, two = (step_work(model, batch, draft_tokens=count) for count in (0, 1, 2))
    assert plain.operations("draft") == 0
    assert one.operations() - plain.operations() == one.operations("draft") > 0
    # One token a request both times: the second pass sees one token more.
    more = 2 * 128 * 1088 * 8
    assert float(two.operations("draft")) == pytest.approx(2 * float(one.operations("draft")) + more)


def test_quantised_weights_are_multiplied_in_their_arithmetic():
    names = step_work(describe(DEEPSEEK_V3), MIXED).operations_by_arithmetic()
    assert set(names) == {"fp8", "bf16"} and names["fp8"] > 5 * names["bf16"]
    kept = step_work(describe(GPT_OSS_120B), MIXED)
    assert set(kept.operations_by_arithmetic()) == {"bf16"}
    assert float(kept.bytes("expert_compute")) == pytest.approx(
        36 * 128 * (3 * 2880 * 2880 * 4.25 / 8 + 3 * 2880 * 2), rel=1e-3
    )


def test_cache_dtype_is_that_of_the_engine():
    sizes = {"auto": 2, "fp8_e4m3": 1, "bfloat16": 2, "nvfp4": 4.5 / 8, "int8_per_token_head": 1 + 4 / 128}
    for dtype, size in sizes.items():
        assert describe(LLAMA_405B, kv_cache_dtype=dtype).kv_bytes_per_token() == 516_096 / 2 * size
    assert describe(DEEPSEEK_V3, kv_cache_dtype="fp8_ds_mla").kv_bytes_per_token() == 61 * 656


@pytest.mark.parametrize(("op", "two", "eight"), [("all_reduce", 1, 1.75), ("all_gather", 0.5, 0.875), ("send", 1, 1)])
def test_bus_factors(op: str, two: float, eight: float):
    assert BUS_FACTORS[op](2) == two and BUS_FACTORS[op](8) == eight
    assert BUS_FACTORS["reduce_scatter"](8) == BUS_FACTORS["all_to_all"](8) == BUS_FACTORS["all_gather"](8)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_any_sharding_computes(tensor: int, pipeline: int, data: int, expert: bool):
    config: dict[str, Any] = DEEPSEEK_V3 | {"num_hidden_layers": 5}
    work = step_work(describe(config), MIXED, Sharding.vllm(tensor, pipeline, data, expert), stage=pipeline - 1)
    assert math.isfinite(float(work.bytes())) and work.operations() >= 0
