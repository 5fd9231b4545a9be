"""Reads a Hugging Face config.json: what architecture it describes.

What is not understood is named in Model.not_understood, in plain sentences; for a well-formed JSON object nothing is
raised. Shapes are those of transformers' modelling code (release 5.19, 2026).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .architecture import (
    Attention,
    Dense,
    Experts,
    Indexer,
    LatentAttention,
    Layer,
    Linear,
    Mixer,
    Model,
    Recurrent,
    Split,
)
from .formats import BF16, FP32, Format, cache_dtype, dtype, quantisation, shorten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MOST_LAYERS = 10_000
LARGEST = 1 << 40


class ConfigError(Exception):
    """A model's config.json that cannot be read; the message names it."""


# Families: what a config does not say because transformers' code for its model_type does


@dataclass(frozen=True)
class Family:
    """What is built into the code of a model_type."""

    qkv_bias: bool = False  # where the config does not say
    o_bias: bool | None = None  # None: as qkv
    qk_norm: str = ""  # head: one norm of head_dim for all heads; full: over all heads together
    sinks: bool = False  # a number for each head
    gated: bool = True  # three matrices in a feed-forward block, else two
    mlp_bias: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    correction: bool = False  # the router adds a number to each expert's score
    norms: int = 2  # of a layer
    norm_bias: bool = False
    head_bias: bool = False
    output_gate: bool = False  # queries come with a gate of the same width
    shared_gate: bool = False  # the shared expert has a gate of one output
    pattern: int = 0  # of alternating windows, where the config does not say: every pattern-th layer is full
    tied: bool = False  # where the config does not say
    shared_width: str = ""  # field that is the width of the shared experts


_LLAMA = Family()
_QWEN3 = Family(qk_norm="head")
_GLM_MOE = Family(o_bias=False, correction=True)
_QWEN_NEXT = Family(qk_norm="head", output_gate=True, shared_gate=True)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "mixtral": _LLAMA,
    "phi3": _LLAMA,
    "granite": _LLAMA,
    "granitemoe": _LLAMA,
    "smollm3": _LLAMA,
    "qwen2": Family(qkv_bias=True, o_bias=False),
    "qwen2_moe": Family(qkv_bias=True, o_bias=False, shared_gate=True),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5_text": _QWEN_NEXT,
    "qwen3_5_moe_text": _QWEN_NEXT,
    "gemma": Family(tied=True),
    "gemma2": Family(norms=4, pattern=2, tied=True),
    "gemma3_text": Family(norms=4, qk_norm="head", pattern=6, tied=True),
    "gpt_oss": Family(qkv_bias=True, o_bias=True, sinks=True, expert_bias=True, router_bias=True),
    "olmo2": Family(qk_norm="full"),
    "olmo3": Family(qk_norm="full"),
    "olmoe": Family(qk_norm="full"),
    "phi": Family(qkv_bias=True, gated=False, mlp_bias=True, norms=1, norm_bias=True, head_bias=True),
    "phimoe": Family(norm_bias=True),
    "glm4": Family(o_bias=False, norms=4),
    "glm4_moe": _GLM_MOE,
    "glm4_moe_lite": Family(correction=True),
    "glm_moe_dsa": Family(correction=True),
    "seed_oss": Family(qkv_bias=True, o_bias=False),
    "deepseek_v2": _LLAMA,
    "deepseek_v3": Family(correction=True),
    "deepseek_v32": Family(correction=True),
    "kimi_k2": Family(correction=True),
    "minimax_m2": Family(qk_norm="full", correction=True),
    "llama4_text": Family(shared_width="intermediate_size"),
    "jamba": _LLAMA,
    "bamba": _LLAMA,
    "nemotron_h": Family(gated=False, norms=1, correction=True),
}
_NEXTN = "num_nextn_predict_layers"

# Fields that say nothing about operations or bytes; with those that are read, what a config of a known kind has.
_NOT_NEEDED = """
_name_or_path add_cross_attention architectures attention_dropout attention_multiplier attn_logit_softcapping
attn_rotary_emb attn_scale attn_temperature_tuning auto_map aux_loss_alpha bos_token bos_token_id
cache_implementation chunk_size chunk_size_feed_forward clip_qkv compression_config cross_attention_hidden_size
decoder_start_token_id dtype embd_pdrop embedding_multiplier eos_token_id ep_size experts_per_token
final_logit_softcapping finetuning_task floor_scale for_llm_compressor forced_bos_token_id forced_eos_token_id
hidden_act hidden_activation hidden_dropout id2label initial_context_length initializer_range input_jitter_noise
is_decoder is_encoder_decoder label2id layer_norm_eps layer_norm_epsilon layernorm_epsilon lm_head_bias
logits_scaling mamba_chunk_size mamba_conv_bias mamba_hidden_act mamba_proj_bias max_position_embeddings
max_window_layers mlp_hidden_act model_type moe_layer_freq moe_shared_expert_overlap mtp_layers_block_type
n_group no_rope_layer_interval no_rope_layers norm_eps norm_topk_prob num_logits_to_keep
original_max_position_embeddings output_attentions output_hidden_states output_router_logits pad_token_id
partial_rotary_factor prefix pretraining_tp problem_type pruned_heads qk_layernorm quantization_config
query_pre_attn_scalar rescale_prenorm_residual resid_pdrop residual_dropout residual_in_fp32 residual_multiplier
return_dict rms_norm_eps rope_interleave rope_local_base_freq rope_parameters rope_ratio rope_scaling rope_theta
rotary_dim rotary_emb_base routed_scaling_factor router_aux_loss_coef router_jitter_noise scoring_func
scoring_function sep_token_id seq_aux seq_length swiglu_alpha swiglu_limit text_config tie_encoder_decoder
time_step_floor time_step_limit time_step_max time_step_min time_step_rank topk_group topk_method torch_dtype
transformers_version unsloth_fixed unsloth_version use_associative_scan use_bias use_bidirectional_attention
use_cache use_conv_bias use_mamba_kernels use_mambapy use_qk_norm z_loss_coefficient
"""
NOT_NEEDED = frozenset(_NOT_NEEDED.split())
NOT_TEXT = ("vision_config", "audio_config", "vision_tower_config", "speech_config")


def load_model(path: Path, dtype_name: str = "auto", kv_cache_dtype: str = "auto") -> Model:
    """The model that a config.json describes. Raises ConfigError when it cannot be read or is no JSON object."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the model's config.json cannot be read ({error.strerror}): {path}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the model's config.json is not JSON ({error}): {path}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"the model's config.json is not a JSON object: {path}")
    return describe(config, dtype_name, kv_cache_dtype)


def describe(config: Mapping[str, Any], dtype_name: str = "auto", kv_cache_dtype: str = "auto") -> Model:
    """The architecture that a config describes; `auto` dtypes are the checkpoint's own. Never raises for a JSON object.

    The dtype's names are those of vLLM's --dtype and --kv-cache-dtype, `torch.bfloat16` and the like included.
    """
    return _Reader(config, dtype_name, kv_cache_dtype).model()


class _Reader:
    """Reads one config; collects what it does not understand, each sentence once."""

    def __init__(self, config: Mapping[str, Any], dtype_name: str, kv_cache_dtype: str):
        self.notes: dict[str, None] = {}
        self.used: set[str] = set()
        inner = config.get("text_config")
        if isinstance(inner, dict):
            for name in NOT_TEXT:
                if name in config:
                    self.note(f"{name}: the encoder of what is not text is not counted.")
            outer = {key: value for key, value in config.items() if key not in inner and key not in NOT_TEXT}
            config = {**outer, **inner}
        self.config = config
        self.kind = self.text("model_type") or ""
        self.family = FAMILIES.get(self.kind, _LLAMA)
        if self.kind not in FAMILIES:
            shown = f"the model_type {shorten(self.kind)} is not known" if self.kind else "the config has no model_type"
            self.note(f"{shown}: it is taken for a decoder like Llama, with what its fields say.")
        self.activations = self._activations(dtype_name)
        described = config.get("quantization_config", config.get("compression_config"))
        self.quantisation = quantisation(described, self.activations)
        for sentence in self.quantisation.not_understood:
            self.note(sentence)
        self.kv_cache = self._kv_cache(kv_cache_dtype)
        self.hidden = self.integer("hidden_size", "n_embd", "d_model")
        self.heads = self.integer("num_attention_heads", "n_head", "n_heads")
        self.layer_index = 0

    # Fields

    def note(self, sentence: str) -> None:
        self.notes[sentence] = None

    def integer(self, *names: str, zero: bool = False) -> int | None:
        """The first of the fields that is there and not null, if it is a positive whole number (or 0, with `zero`)."""
        self.used.update(names)
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST:
                value = int(value)
            if isinstance(value, int) and not isinstance(value, bool) and (0 if zero else 1) <= value < LARGEST:
                return value
            if value != 0 or isinstance(value, bool):
                self.note(f"{name} is {shorten(value)}, not a number that fits: it is left out.")
        return None

    def needed(self, what: str, *names: str) -> int | None:
        """An integer without which `what` cannot be counted."""
        value = self.integer(*names)
        if value is None:
            self.note(f"{names[0]} is missing: {what} cannot be counted.")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        self.used.add(name)
        value = self.config.get(name)
        return value if isinstance(value, bool) else default

    def text(self, name: str) -> str | None:
        self.used.add(name)
        value = self.config.get(name)
        return value if isinstance(value, str) else None

    def listed(self, *names: str) -> list[Any] | None:
        self.used.update(names)
        found = (self.config.get(name) for name in names)
        return next((value for value in found if isinstance(value, list) and value), None)

    # Formats

    def _activations(self, name: str) -> Format:
        # vLLM serves a float32 checkpoint in 16 bits when it chooses the dtype itself; what it chose is in `name`.
        given = next((self.config[key] for key in ("dtype", "torch_dtype") if self.config.get(key) is not None), None)
        wanted = given if name in ("auto", "") else name
        form = dtype(wanted)
        if form in (None, *_NOT_ACTIVATIONS):
            said = "the config names no dtype" if wanted is None else f"the dtype {shorten(wanted)} is not known"
            self.note(f"{said}: activations and plain weights are counted as bf16.")
            return BF16
        return form or BF16

    def _kv_cache(self, name: str) -> Format:
        if name in ("auto", ""):
            return self.quantisation.kv_cache or self.activations
        form = cache_dtype(name)
        if form is None:
            self.note(f"the KV cache's dtype {shorten(name)} is not known: it is counted as {self.activations.name}.")
        return form or self.activations

    def linear(
        self,
        name: str,
        inputs: int,
        outputs: int,
        split: Split = Split.NONE,
        units: int = 0,
        bias: bool = False,
        expert: bool = False,
        plain: bool = False,
    ) -> Linear:
        """A matrix of the present layer; `plain` ones are never quantised."""
        form = self.activations
        if not plain:
            module = f"model.layers.{self.layer_index}.{name}"
            form = self.quantisation.format_of(module, self.activations, expert=expert)
        return Linear(name, inputs, outputs, form, bias, split, units or (inputs if split is Split.INPUTS else outputs))

    # The whole

    def model(self) -> Model:
        hidden = self.hidden
        if hidden is None:
            self.note("hidden_size is missing: no matrix that reads or writes the hidden state can be counted.")
        vocabulary = self.integer("vocab_size")
        if vocabulary is None:
            self.note("vocab_size is missing: embedding and logits cannot be counted.")
        count = self._layer_count()
        mixers, blocks = self._mixer_kinds(count), self._block_kinds(count)
        layers = []
        for index, (mixer, block) in enumerate(zip(mixers, blocks, strict=True)):
            self.layer_index = index
            layers.append(self._layer(mixer, block))
        tied = self.flag("tie_word_embeddings", self.family.tied)
        head = None
        if hidden and vocabulary:
            form = self.quantisation.format_of("lm_head", self.activations, head=True) if not tied else self.activations
            bias = self.flag("lm_head_bias", self.family.head_bias)
            head = Linear("lm_head", hidden, vocabulary, form, bias, Split.OUTPUTS, vocabulary)
        drafts, projection = self._drafts(count, mixers, blocks)
        norm = (hidden or 0) * (2 if self.family.norm_bias else 1)
        self._say_what_was_not_used()
        return Model(
            kind=self.kind,
            hidden=hidden,
            vocabulary=vocabulary,
            layers=tuple(layers),
            activations=self.activations,
            kv_cache=self.kv_cache,
            head=head,
            tied=tied,
            vectors=norm,
            draft_layers=drafts,
            draft_projection=projection,
            draft_vectors=3 * (hidden or 0),
            quantisation=self.quantisation,
            not_understood=tuple(self.notes),
        )

    def _layer_count(self) -> int:
        names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        listed = self.listed("layers_block_type", "layer_types")
        pattern = self.text("hybrid_override_pattern")
        count = self.integer(*names) or (len(listed) if listed else len(pattern) if pattern else None)
        if count is None:
            self.note("num_hidden_layers is missing: no layer can be counted.")
            return 0
        if count > MOST_LAYERS:
            self.note(f"num_hidden_layers is {count}, more than {MOST_LAYERS}: no layer is counted.")
            return 0
        return count

    def _say_what_was_not_used(self) -> None:
        left = sorted(str(key) for key in self.config if key not in self.used and key not in NOT_NEEDED)
        left = [key for key in left if not key.startswith("_") and not key.endswith("_token_id")]
        if left:
            shown = ", ".join(shorten(key)[1:-1] for key in left[:20]) + (", ..." if len(left) > 20 else "")
            self.note(f"fields that were not read: {shown}.")

    # Which kind each layer is of

    def _mixer_kinds(self, count: int) -> list[str]:
        """For each layer what mixes its tokens: full, sliding, chunked, linear, mamba, none, or `?` and a name."""
        listed = self.listed("layers_block_type", "layer_types")
        pattern = self.text("hybrid_override_pattern")
        if listed is not None:  # the list says what these would
            self.used.update(_IMPLIED)
            kinds = [_MIXERS.get(each, f"?{each}") if isinstance(each, str) else "?" for each in listed]
        elif pattern:
            kinds = [_PATTERN.get(letter, f"?{letter}") for letter in pattern]
        else:
            kinds = self._periodic_mixers(count)
        if len(kinds) < count:
            self.note(f"the list of layers names {len(kinds)} of {count}: the rest is taken for its last.")
            kinds += [kinds[-1] if kinds else "full"] * (count - len(kinds))
        recurrent = "mamba" if self._has_mamba() else "linear"
        return [recurrent if kind == "linear" else kind for kind in kinds[:count]]

    def _has_mamba(self) -> bool:
        return any(name in self.config for name in ("mamba_d_state", "ssm_state_size", "state_size"))

    def _periodic_mixers(self, count: int) -> list[str]:
        period, offset = self.integer("attn_layer_period"), self.integer("attn_layer_offset", zero=True) or 0
        if period:
            return ["full" if index % period == offset else "mamba" for index in range(count)]
        interval = self.integer("full_attention_interval") or (4 if self.family is _QWEN_NEXT else None)
        if interval and any(name.startswith("linear_") for name in self.config):
            return ["full" if (index + 1) % interval == 0 else "linear" for index in range(count)]
        attending = self.listed("attn_layer_indices")
        if attending:
            return ["full" if index in attending else "mamba" for index in range(count)]
        if self._has_mamba() and self.heads is None:
            return ["mamba"] * count
        if self.integer("attention_chunk_size"):
            ropeless = self.listed("no_rope_layers")
            step = self.integer("no_rope_layer_interval") or 4
            if ropeless is None or len(ropeless) < count:
                ropeless = [int((index + 1) % step != 0) for index in range(count)]
            return ["chunked" if ropeless[index] else "full" for index in range(count)]
        return self._windows(count)

    def _windows(self, count: int) -> list[str]:
        window = self.integer("sliding_window")
        # Without the field the window is used, except by the Qwens, whose default is not to (transformers).
        used = self.flag("use_sliding_window", not self.kind.startswith("qwen"))
        if window is None or not used:
            return ["full"] * count
        period = self.integer("sliding_window_pattern", "_sliding_window_pattern") or self.family.pattern
        if period:
            return ["full" if (index + 1) % period == 0 else "sliding" for index in range(count)]
        first = (self.integer("max_window_layers", zero=True) or 0) if "use_sliding_window" in self.config else 0
        return ["sliding" if index >= first else "full" for index in range(count)]

    def _block_kinds(self, count: int) -> list[str]:
        """For each layer: dense, experts or none."""
        experts = self._expert_count()
        whole = "experts" if experts and experts > 1 else "dense"
        pattern, listed = self.text("hybrid_override_pattern"), self.listed("layers_block_type", "layer_types")
        if pattern and not listed:
            return [_PATTERN_BLOCKS.get(letter, "none") for letter in pattern[:count].ljust(count)]
        if listed and any(each in ("mlp", "moe") for each in listed):
            named = [{"mlp": "dense", "moe": "experts"}.get(str(each), "none") for each in listed[:count]]
            return named + ["none"] * (count - len(named))
        if whole == "dense":
            return ["dense"] * count
        given = self.listed("mlp_layer_types")
        self.used.update(_SPARSE)
        if given and len(given) >= count:
            return ["experts" if each == "sparse" else "dense" for each in given[:count]]
        return [whole if self._is_sparse(index) else "dense" for index in range(count)]

    def _is_sparse(self, index: int) -> bool:
        named = self.listed("moe_layers")
        if named is not None:
            return index in named
        step = self.integer("interleave_moe_layer_step")
        if step:
            return (index + 1) % step == 0
        period = self.integer("expert_layer_period")
        if period:
            return index % period == (self.integer("expert_layer_offset", zero=True) or 0)
        interval = self.integer("moe_layer_interval")
        if interval:
            first = self.integer("moe_layer_start_index", zero=True) or 0
            last = self.integer("moe_layer_end_index", zero=True)
            return first <= index and (last is None or index <= last) and (index + 1) % interval == 0
        frequency = self.config.get("moe_layer_freq")
        if isinstance(frequency, list) and index < len(frequency):
            return frequency[index] in (1, True)
        dense = self.integer("first_k_dense_replace", zero=True)
        if dense is not None:
            every = frequency if isinstance(frequency, int) and frequency > 0 else 1
            return index >= dense and index % every == 0
        return (
            index not in (self.listed("mlp_only_layers") or [])
            and (index + 1) % (self.integer("decoder_sparse_step") or 1) == 0
        )

    # Parts of a layer

    def _layer(self, mixer: str, block: str) -> Layer:
        norm = (self.hidden or 0) * (2 if self.family.norm_bias else 1)
        return Layer(self._mixers(mixer), self._block(block), norm * self.family.norms)

    def _mixers(self, kind: str) -> tuple[Mixer, ...]:
        found: Sequence[Mixer | None]
        if kind in ("full", "sliding", "chunked"):
            latent = self.config.get("kv_lora_rank") is not None
            found = (self._latent() if latent else self._attention(kind),)
        elif kind == "mamba":
            found = (self._mamba(),)
        elif kind == "linear":
            found = (self._delta(),)
        else:
            if kind != "none":
                name = shorten(kind.removeprefix("?"))
                self.note(f"layers of the kind {name} are not understood: what mixes their tokens is not counted.")
            found = ()
        return tuple(each for each in found if each is not None)

    def _head_dim(self) -> int | None:
        given = self.integer("head_dim", "attention_head_dim")
        if given is None and self.hidden and self.heads:
            return max(self.hidden // self.heads, 1)
        return given

    def _attention(self, kind: str) -> Attention | None:
        heads = self.heads
        dim = self._head_dim()
        if heads is None or dim is None:
            missing = "num_attention_heads" if heads is None else "head_dim"
            self.note(f"{missing} is missing: attention cannot be counted.")
            return None
        kv_heads = self.integer("num_key_value_heads", "num_kv_heads", "n_head_kv") or (
            1 if self.flag("multi_query") else heads
        )
        value = self.integer("v_head_dim") or dim
        window = (
            self.integer("attention_chunk_size" if kind == "chunked" else "sliding_window") if kind != "full" else None
        )
        if kind != "full" and window is None:
            self.note(f"layers are named {kind}, but the size of their window is missing: they are counted as full.")
        family = self.family
        qkv_bias = self.flag("attention_bias", self.flag("qkv_bias", family.qkv_bias))
        o_bias = self.flag("attention_out_bias", qkv_bias if family.o_bias is None else family.o_bias)
        projections: list[Linear] = []
        if self.hidden:
            gate = 2 if family.output_gate else 1
            projections = [
                self.linear("self_attn.q_proj", self.hidden, gate * heads * dim, Split.OUTPUTS, heads, qkv_bias),
                self.linear("self_attn.k_proj", self.hidden, kv_heads * dim, Split.OUTPUTS, kv_heads, qkv_bias),
                self.linear("self_attn.v_proj", self.hidden, kv_heads * value, Split.OUTPUTS, kv_heads, qkv_bias),
                self.linear("self_attn.o_proj", heads * value, self.hidden, Split.INPUTS, heads, o_bias),
            ]
        norms = family.qk_norm
        if self.kind == "glm4_moe" and self.flag("use_qk_norm"):
            norms = "head"
        vectors = {"head": 2 * dim, "full": (heads + kv_heads) * dim}.get(norms, 0) + (heads if family.sinks else 0)
        return Attention(
            heads, kv_heads, dim, value, window, kind == "chunked" and window is not None, tuple(projections), vectors
        )

    def _latent(self) -> LatentAttention | None:
        heads = self.heads
        latent = self.needed("attention", "kv_lora_rank")
        rope = self.needed("attention", "qk_rope_head_dim")
        nope = self.needed("attention", "qk_nope_head_dim")
        value = self.needed("attention", "v_head_dim")
        if heads is None:
            self.note("num_attention_heads is missing: attention cannot be counted.")
        if heads is None or latent is None or rope is None or nope is None or value is None:
            return None
        self.used.update(("num_key_value_heads", "head_dim", "qk_head_dim"))  # follow from the others
        rank, bias = self.integer("q_lora_rank"), self.flag("attention_bias")
        queries = heads * (nope + rope)
        projections: list[Linear] = []
        hidden = self.hidden
        if rank:
            if hidden:
                projections.append(self.linear("self_attn.q_a_proj", hidden, rank, bias=bias))
            projections.append(self.linear("self_attn.q_b_proj", rank, queries, Split.OUTPUTS, heads))
        elif hidden:
            projections.append(self.linear("self_attn.q_proj", hidden, queries, Split.OUTPUTS, heads))
        if hidden:
            projections.append(self.linear("self_attn.kv_a_proj_with_mqa", hidden, latent + rope, bias=bias))
            projections.append(self.linear("self_attn.o_proj", heads * value, hidden, Split.INPUTS, heads, bias))
        expansion = self.linear("self_attn.kv_b_proj", latent, heads * (nope + value), Split.OUTPUTS, heads)
        return LatentAttention(
            heads, nope, rope, value, latent, tuple(projections), expansion, latent + (rank or 0), self._indexer(rank)
        )

    def _indexer(self, rank: int | None) -> Indexer | None:
        top = self.integer("index_topk")
        if top is None:
            return None
        heads, dim = self.needed("the indexer", "index_n_heads"), self.needed("the indexer", "index_head_dim")
        if heads is None or dim is None:
            return None
        hidden = self.hidden
        projections = []
        if rank or hidden:
            projections.append(self.linear("self_attn.indexer.wq_b", rank or hidden or 1, heads * dim))
        if hidden:
            projections.append(self.linear("self_attn.indexer.wk", hidden, dim))
            projections.append(self.linear("self_attn.indexer.weights_proj", hidden, heads, plain=True))
        return Indexer(heads, dim, top, tuple(projections), 2 * dim)

    def _delta(self) -> Recurrent | None:
        """Gated delta rule: transformers, Qwen3NextGatedDeltaNet."""
        names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
        self.used.update(names)
        if not any(name in self.config for name in names):
            self.note("linear attention other than the gated delta rule is not understood: it is not counted.")
            return None
        key_heads, value_heads, key_dim, value_dim = (self.needed("linear attention", name) for name in names)
        if key_heads is None or value_heads is None or key_dim is None or value_dim is None:
            return None
        kernel = self.integer("linear_conv_kernel_dim") or 1
        keys, values = key_heads * key_dim, value_heads * value_dim
        projections: tuple[Linear, ...] = ()
        if self.hidden:
            name = "linear_attn.in_proj_qkvz"
            projections = (
                self.linear(name, self.hidden, 2 * keys + 2 * values, Split.OUTPUTS, key_heads),
                self.linear("linear_attn.in_proj_ba", self.hidden, 2 * value_heads, Split.OUTPUTS, value_heads),
                self.linear("linear_attn.out_proj", values, self.hidden, Split.INPUTS, value_heads),
            )
        channels = 2 * keys + values
        return Recurrent(
            kind="linear",
            units=value_heads,
            state=key_dim * value_dim,
            products=3,
            kernel=kernel,
            channels=channels,
            projections=projections,
            vectors=channels * kernel + 2 * value_heads + value_dim,
            state_format=self._state_format(),
        )

    def _mamba(self) -> Recurrent | None:
        """A selective state space, Mamba-2 where it has heads (transformers: NemotronHMamba2Mixer, JambaMambaMixer)."""
        state = self.needed("a state space layer", "mamba_d_state", "ssm_state_size", "state_size")
        kernel = self.integer("mamba_d_conv", "conv_kernel") or 1
        heads = self.integer("mamba_n_heads", "mamba_num_heads", "num_heads")
        dim = self.integer("mamba_d_head", "mamba_head_dim") or (
            self.integer("head_dim") if self.kind == "mamba2" else None
        )
        groups = self.integer("mamba_n_groups", "n_groups") or 1
        expand = self.integer("mamba_expand", "expand") or 2
        inner = self.integer("mamba_d_ssm") or (heads * dim if heads and dim else None)
        inner = inner or (expand * self.hidden if self.hidden else None)
        if state is None or inner is None:
            return None
        bias = self.flag("mamba_proj_bias", self.flag("use_bias"))
        conv_bias = 1 if self.flag("mamba_conv_bias", self.flag("use_conv_bias", True)) else 0
        cache = self._state_format()
        if heads:
            projections: list[Linear] = []
            if self.hidden:
                name = "mixer.in_proj"
                projections = [
                    self.linear(name, self.hidden, 2 * inner, Split.OUTPUTS, heads, bias),
                    self.linear(name, self.hidden, 2 * groups * state, Split.OUTPUTS, groups, bias),
                    self.linear(name, self.hidden, heads, Split.OUTPUTS, heads, bias),
                    self.linear("mixer.out_proj", inner, self.hidden, Split.INPUTS, heads, bias),
                ]
            channels = inner + 2 * groups * state
            return Recurrent(
                kind="mamba",
                units=heads,
                state=inner // heads * state,
                products=2,
                kernel=kernel,
                channels=channels,
                projections=tuple(projections),
                vectors=channels * (kernel + conv_bias) + 3 * heads + inner,
                state_format=cache,
            )
        rank = self.integer("mamba_dt_rank", "time_step_rank")
        if rank is None and self.hidden:
            rank = -(-self.hidden // 16)
        projections = []
        if self.hidden:
            projections.append(self.linear("mamba.in_proj", self.hidden, 2 * inner, Split.OUTPUTS, inner, bias))
            projections.append(self.linear("mamba.out_proj", inner, self.hidden, Split.INPUTS, inner, bias))
        if rank:
            projections.append(self.linear("mamba.x_proj", inner, rank + 2 * state, Split.INPUTS, inner))
            projections.append(self.linear("mamba.dt_proj", rank, inner, Split.OUTPUTS, inner, bias=True))
        norms = (rank or 0) + 2 * state if self.kind == "jamba" else 0
        return Recurrent(
            kind="mamba",
            units=inner,
            state=state,
            products=2,
            kernel=kernel,
            channels=inner,
            projections=tuple(projections),
            vectors=inner * (kernel + conv_bias + state + 1) + norms,
            state_format=cache,
        )

    def _state_format(self) -> Format | None:
        """Of a recurrent state, as vLLM keeps it: what the config says, float32 for Nemotron-H, else as activations."""
        names = ("mamba_ssm_cache_dtype", "mamba_ssm_dtype")
        given = next((form for form in (dtype(self.text(name)) for name in names) if form), None)
        return given or (FP32 if self.kind == "nemotron_h" else None)

    def _expert_count(self) -> int | None:
        return self.integer("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

    def _block(self, kind: str) -> Dense | Experts | None:
        if kind == "none":
            return None
        if self.hidden is None:
            return None
        if kind == "dense":
            width = self.integer("intermediate_size_mlp", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
            if width is None:
                self.note("intermediate_size is missing: feed-forward blocks cannot be counted.")
                return None
            return Dense(self._gated("mlp", self.hidden, width, self.flag("mlp_bias", self.family.mlp_bias)))
        return self._experts(self.hidden)

    def _gated(
        self, name: str, inputs: int, width: int, bias: bool = False, expert: bool = False
    ) -> tuple[Linear, ...]:
        """The matrices of a feed-forward block: gate (where it has one), up, down."""
        into = ("gate_proj", "up_proj") if self.family.gated else ("up_proj",)
        first = [self.linear(f"{name}.{each}", inputs, width, Split.OUTPUTS, width, bias, expert) for each in into]
        return (*first, self.linear(f"{name}.down_proj", width, inputs, Split.INPUTS, width, bias, expert))

    def _experts(self, hidden: int) -> Experts | None:
        count = self._expert_count()
        width = self.integer("moe_intermediate_size", "intermediate_size", "expert_intermediate_size")
        per_token = self.integer(
            "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "top_k_experts"
        )
        if count is None or width is None or per_token is None:
            missing = "moe_intermediate_size" if width is None else "num_experts_per_tok"
            self.note(f"{missing} is missing: experts cannot be counted.")
            return None
        if per_token > count:
            self.note(f"num_experts_per_tok is {per_token}, more than the {count} experts: all of them are counted.")
            per_token = count
        family = self.family
        narrow = self.integer("moe_latent_size")
        inputs = narrow or hidden
        latent: tuple[Linear, ...] = ()
        if narrow:
            latent = (
                self.linear("mixer.fc1_latent_proj", hidden, narrow),
                self.linear("mixer.fc2_latent_proj", narrow, hidden),
            )
        return Experts(
            count=count,
            per_token=per_token,
            matrices=self._gated("mlp.experts.0", inputs, width, family.expert_bias, expert=True),
            router=self.linear("mlp.gate", hidden, count, bias=family.router_bias, plain=True),
            shared=self._shared(hidden, width),
            latent=latent,
            vectors=count if family.correction else 0,
            width=inputs,
        )

    def _shared(self, hidden: int, width: int) -> tuple[Linear, ...]:
        """Shared experts: n of the routed experts' width together, or of a width of their own."""
        number = self.integer("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", zero=True)
        own = self.integer(
            "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"
        )
        if own is None and self.family.shared_width:
            own = self.integer(self.family.shared_width)
        if self.config.get("moe_shared_expert_intermediate_size") is not None:
            total = (own or 0) * (1 if number is None else number)  # Nemotron-H: the width of each
        else:
            total = own or (number or 0) * width
        if not total:
            return ()
        matrices = self._gated("mlp.shared_expert" if own else "mlp.shared_experts", hidden, total)
        if self.family.shared_gate:
            return (*matrices, self.linear("mlp.shared_expert_gate", hidden, 1, plain=True))
        return matrices

    def _drafts(self, count: int, mixers: list[str], blocks: list[str]) -> tuple[tuple[Layer, ...], Linear | None]:
        """Multi-token prediction: a projection of two hidden states to one and a block like the last layer's.

        DeepSeek-V3, 2024, section 2.2: embedding and output projection are the main model's.
        """
        drafts = self.integer(_NEXTN, "mtp_num_hidden_layers", zero=True) or 0
        if not drafts or not count or not self.hidden:
            return (), None
        if drafts > MOST_LAYERS:
            self.note(f"{_NEXTN} is {drafts}: multi-token prediction is not counted.")
            return (), None
        layers = []
        for number in range(drafts):
            self.layer_index = count + number
            mixer = next((kind for kind in reversed(mixers) if kind in ("full", "sliding")), "none")
            block = next((kind for kind in reversed(blocks) if kind != "none"), "none")
            layers.append(self._layer(mixer, block))
        self.layer_index = count
        return tuple(layers), self.linear("eh_proj", 2 * self.hidden, self.hidden, plain=True)


_NOT_ACTIVATIONS = (dtype("fp8"), dtype("int8"), dtype("fp4"))

_SPARSE = (
    "moe_layers",
    "interleave_moe_layer_step",
    "expert_layer_period",
    "expert_layer_offset",
    "moe_layer_interval",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "mlp_only_layers",
)
_IMPLIED = (
    "sliding_window",
    "use_sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "full_attention_interval",
    "attn_layer_period",
    "attn_layer_offset",
)

# layer_types and layers_block_type of transformers; "none": the layer is a feed-forward block alone.
_MIXERS = {
    "full_attention": "full",
    "attention": "full",
    "indexed_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "mamba",
    "mamba2": "mamba",
    "moe": "none",
    "mlp": "none",
}
# hybrid_override_pattern of Nemotron-H: a letter a layer.
_PATTERN = {"M": "mamba", "*": "full", "-": "none", "E": "none"}
_PATTERN_BLOCKS = {"-": "dense", "E": "experts"}
