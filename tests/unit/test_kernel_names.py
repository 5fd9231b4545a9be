"""Names of kernels and operators as profilers printed them in public, and what the table makes of them."""

from __future__ import annotations

import pytest

from stagetrace.analysis.kernel_names import NO_RULE, RULES, rule_for
from stagetrace.instrument.stages import BY_NAME

# Kernels of vLLM and SGLang on an MI355X and an MI300X: InferenceX issues 819, 863 and 1005, and a kernel breakdown of
# vLLM with tensor parallel 4 that was published with it.
AMD = {
    "void wvSplitK_hf_sml_<__hip_bfloat16, 64, 2, 16, 8, 2, 4>(int, int, int, int, int, int)": ("gemm", ""),
    "aiter::mla_dec_stage1_bf16_a16w16_subQ16_mqa16": ("attention", "attention"),
    "kn_mla_reduce_v1": ("attention", "attention"),
    "aiter::fmha_fwd_hd192_hd128_bf16_causal_group": ("attention", "attention"),
    "_fwd_kernel_stage2_asm": ("attention", "attention"),
    "void ck_tile::kentry<1, ck_tile::Rmsnorm2dFwd<ck_tile::Rmsnorm2dFwdPipelineOnePass<>>>": ("norm", ""),
    "cross_device_reduce_2stage<bf16, 4>": ("collective", "collective"),
    "aiter::cross_device_reduce_2stage": ("collective", "collective"),
    "void ck::kernel_moe_mxgemm_2lds<ck::GridwiseMoeGemmMX_BPreshuffle<>>": ("experts", "expert_compute"),
    "aiter::fmoe_bf16_blockscaleFp8_g1u1_vs_silu_1tg_ps_32x256": ("experts", "expert_compute"),
    "void ck_tile::kentry<2, ck_tile::MoeSortingMultiPhaseKernel_P23<ck_tile::MoeSortingProblemMp<>>>": (
        "routing",
        "moe_route",
    ),
    "_moe_mxfp4_sort_kernel": ("routing", "moe_route"),
    "void vllm::concat_and_cache_mla_kernel<__hip_bfloat16, __hip_bfloat16, (vllm::Fp8KVCacheDataType)0>": (
        "cache",
        "attention",
    ),
    "Custom_Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_NTD_SK3_UserArgs_MT256x256x64_MI16x16x1_gfx950": ("gemm", ""),
    "_batched_gemm_a16wfp4_kernel_BLOCK_SIZE_M_4_BLOCK_SIZE_N_32": ("gemm", ""),
    "void aiter::dynamic_per_group_scaled_quant_kernel<std::bfloat16_t, ck_tile::fp4x2_t, 32>": ("quantise", ""),
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>>": ("copy", ""),
    "triton_poi_fused_add_all_reduce_0": ("elementwise", ""),
    "triton_poi_fused_mul_silu_slice_0": ("activation", ""),
}
# On NVIDIA: InferenceX issue 819 (B200), vLLM-Omni pull request 553, nm-vllm pull request 332, SGLang pull request
# 22353, and tables of nsys that were published of other servers.
NVIDIA = {
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<(unsigned long)4096>)": (
        "collective",
        "collective",
    ),
    "ncclDevKernel_SendRecv": ("collective", "collective"),
    "flashinfer::allreduce_fusion_kernel_twoshot": ("collective", "collective"),
    "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport": ("collective", "collective"),
    "cross_device_reduce_1stage": ("collective", "collective"),
    "bmm_E4m3_E4m3E4m3_Fp32_t128x16x128": ("experts", "expert_compute"),
    "bmm_Bfloat16_E4m3E4m3_Fp32_t128x16x128": ("experts", "expert_compute"),
    "gemm_Bfloat16_E4m3E4m3_Fp32_t128x16x128": ("gemm", ""),
    "void moe::dev::finalize::finalizeKernelVecLoad<moe::dev::finalize::KernelParams<>>": ("combine", "expert_combine"),
    "void vllm::moe::count_and_sort_expert_tokens_kernel<int>": ("routing", "moe_route"),
    "void vllm::moe::topkGatingSoftmax<8, 64, 4, 16, int>": ("routing", "moe_route"),
    "void vllm::moe::moe_align_block_size_kernel<int>": ("routing", "moe_route"),
    "fused_moe_kernel": ("experts", "expert_compute"),
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn": ("gemm", ""),
    "nvjet_tst_128x24_64x11_2x1_v_bz_TNT": ("gemm", ""),
    "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x128_warpgroupsize1x1x1": ("gemm", ""),
    "void vllm::rms_norm_kernel<c10::BFloat16>(c10::BFloat16*, c10::BFloat16 const*)": ("norm", ""),
    "void vllm::scaled_fp8_quant_kernel<c10::BFloat16>(c10::Float8_e4m3fn*, c10::BFloat16 const*)": ("quantise", ""),
    "void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*, c10::BFloat16*)": ("rotary", "attention"),
    "void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16, long>": ("embedding", "embed"),
    "void pytorch_flash::flash_fwd_splitkv_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 64, 128, 4>>": (
        "attention",
        "attention",
    ),
    "kernel_unified_attention_2d": ("attention", "attention"),
    "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16>": ("cache", "attention"),
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>": (
        "sampling",
        "sample",
    ),
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": ("copy", ""),
    "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>": ("copy", ""),
    "void at::native::vectorized_elementwise_kernel<(int)4, at::native::BinaryFunctor<float, float, float>>": (
        "elementwise",
        "",
    ),
    "Memcpy DtoH (Device -> Pinned)": ("copy", ""),
    "void marlin::gptq_marlin_repack_kernel<(int)256, (int)4, (bool)0>": ("gemm", ""),
}
# Of a processor: vLLM pull request 28130, and this project's own window on vLLM 0.32 and SGLang 0.5.23.
CPU = {
    "_C::onednn_mm": ("gemm", ""),
    "_C::cpu_fused_moe": ("experts", "expert_compute"),
    "_C_cache_ops::reshape_and_cache": ("cache", "attention"),
    "vllm::unified_attention_with_output": ("attention", "attention"),
    "vllm::unified_kv_cache_update": ("cache", "attention"),
    "aten::embedding": ("embedding", "embed"),
    "aten::mm": ("gemm", ""),
    "aten::copy_": ("copy", ""),
    "aten::mul": ("elementwise", ""),
    "aten::argmax": ("sampling", "sample"),
    "aten::silu": ("activation", ""),
    "c10d::allreduce_": ("collective", "collective"),
    "gloo:all_reduce": ("collective", "collective"),
}


@pytest.mark.parametrize("name", [*AMD, *NVIDIA, *CPU])
def test_a_name_says_what_was_done(name: str):
    rule = rule_for(name)
    assert (rule.kind, rule.stage) == (AMD | NVIDIA | CPU)[name]


def test_other_names_have_no_rule():
    assert rule_for("my_own_kernel_42") is NO_RULE


def test_every_rule_names_a_stage_of_the_vocabulary():
    assert {rule.stage for rule in RULES} <= {*BY_NAME, ""}
