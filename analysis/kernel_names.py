"""What a kernel or an operator does, from its name: one table for NVIDIA's, AMD's and the CPU's.

A rule says the kind of work, and the stage where the name leaves no doubt: a matrix product is one of many stages'. The
first rule that matches counts. Names are those that profilers print; tests/unit/test_kernel_names.py has some of public
traces, with their sources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Rule:
    """One row: `pattern` is searched in the name, in either case; `stage` is empty where several have such kernels."""

    pattern: str
    kind: str
    stage: str = ""


RULES: tuple[Rule, ...] = (
    # Between ranks, before all others: their kernels are fused with sums and norms
    Rule(
        r"deep_?ep.*dispatch|internode::dispatch|intranode::dispatch|low_latency::dispatch",
        "exchange",
        "expert_dispatch",
    ),
    Rule(r"deep_?ep.*combine|internode::combine|intranode::combine|low_latency::combine", "exchange", "expert_combine"),
    Rule(r"\b(nccl|rccl)|ncclDevKernel|ncclKernel|mscclpp?|^c10d::|gloo:", "collective", "collective"),
    Rule(
        r"cross_device_reduce|allreduce|all_reduce(?!_\d*$)|reduce_?scatter|all_?gather(?!_index)|all_?to_?all|multimem_"
        r"|lamport|one_?shot.*reduce|two_?shot|quick_?reduce|shm_(allreduce|gather|all_gather|send|recv)",
        "collective",
        "collective",
    ),
    # Experts
    Rule(
        r"topk_?gating|grouped_?topk|topk_softmax|topk_sigmoid|moe_?align|moe_?sort|MoeSorting|count_and_sort_expert"
        r"|moe_fused_gate|biased_grouped|moe::dev::routing|routing(Indices|Main|Init|Custom|Renormalize|DeepSeek)"
        r"|compute_expert|expert_?offsets|moe_permute|permute_?kernel.*expert|expandInputRows|_moe_mxfp4_sort",
        "routing",
        "moe_route",
    ),
    Rule(
        r"moe_sum|moe_?unpermute|finalizeMoe|moe::dev::finalize|moe_reduction|moe_finalize", "combine", "expert_combine"
    ),
    Rule(
        r"fused_moe|fused_experts|moe_?(mx)?gemm|kernel_moe|moe_wna16|\bfmoe|fmoe_|grouped_?gemm|group_?gemm|MoeFlatmm"
        r"|moe_marlin|marlin_moe|moe::|bmm_E4m3|bmm_Bfloat16_E|cpu_fused_moe|m_grouped|MoE",
        "experts",
        "expert_compute",
    ),
    # Attention, with the writing of its cache and the turning of its keys
    Rule(
        r"fmha|flash_?(fwd|attn|infer::.*(decode|prefill|attention))|flashmla|flash_mla|paged_?attention|unified_attention"
        r"|(decode|prefill)withpagedkvcache|batch(decode|prefill)|mla_(dec|a\d|reduce|attn|prefill)|kn_mla|_fwd_grouped_kernel"
        r"|_fwd_kernel(_stage\d|_ep64|_asm)?|scaled_dot_product|sdpa|attention_kernel|attn_fwd|mha_(fwd|varlen)|merge_attn"
        r"|merge_?states?_kernel|concat_mla|cpu_attention|mla_decode|extend_attention|decode_attention|attention_with_kv",
        "attention",
        "attention",
    ),
    Rule(
        r"reshape_and_cache|kv_cache_update|concat_and_cache|store_kv|set_(mla_)?kv_buffer|set_kv_cache|indexer.*cache|cp_gather_cache"
        r"|gather_cache",
        "cache",
        "attention",
    ),
    Rule(r"rotary|rope|mrope", "rotary", "attention"),
    Rule(
        r"causal_conv1d|selective_scan|chunk_(gated_)?delta|gated_delta|mamba|gdn_|fused_recurrent", "scan", "attention"
    ),
    # What ends the forward pass, and what follows it
    Rule(
        r"topk_?topp|top_?p_|min_p|gumbel|multinomial|argmax|ArgMaxOps|sampling|rejection|exponential|apply_penalt"
        r"|SoftMaxForward|cunn_SoftMax|aten::_?softmax|aten::sort|radix_?sort|log_softmax|apply_token_bitmask",
        "sampling",
        "sample",
    ),
    Rule(r"embedding|vectorized_gather|indexSelect", "embedding", "embed"),
    # Work that several stages have
    Rule(r"(silu|gelu|swiglu|swish|act)_?(and_)?mul|act_and_mul|silu_?slice|aten::(silu|gelu|relu)", "activation", ""),
    Rule(r"rms_?norm|layer_?norm|Rmsnorm2d|rsqrt|group_norm|l2norm", "norm"),
    Rule(r"quant|scaled_fp8|per_token_group|fp8_quant|dequant|to_mx|nvfp4.*(quant|cvt)|cvt_fp16_to_fp4", "quantise"),
    Rule(
        r"gemm|gemv|nvjet|cutlass|cublas|hipblas|C[a-z]{3}_A[a-z]{3}_B[a-z]{3}|wvSplitK|matmul|aten::(mm|bmm|addmm|linear"
        r"|matmul|einsum)\b|onednn|mkldnn|oneDNN|xmma|dot_kernel|splitKreduce|marlin|machete|_scaled_mm|brgemm|weight_packed",
        "gemm",
    ),
    Rule(
        r"memcpy|memset|copy|fill|clone|contiguous|cat\b|CatArray|transpose|FillFunctor|aten::(to|_to_copy|zero_)\b",
        "copy",
    ),
    Rule(r"elementwise|triton_(poi|red|per)|reduce_kernel|aten::\w+|at::native::", "elementwise"),
)

_COMPILED = tuple((re.compile(rule.pattern, re.IGNORECASE), rule) for rule in RULES)
NO_RULE = Rule("", "other")


@cache
def rule_for(name: str) -> Rule:
    """The first rule that the name matches; NO_RULE where none does."""
    return next((rule for pattern, rule in _COMPILED if pattern.search(name)), NO_RULE)
