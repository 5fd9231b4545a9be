"""How a model's numbers are stored and multiplied: dtypes, and the quantisation that a checkpoint's config describes.

A format says what a matrix occupies in memory with its scales, and in which arithmetic its products are computed:
weights of 4 bits without quantised activations are read as 4 bits and multiplied as the activations are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

LONGEST = 60  # characters of a string from a config that a sentence shows


@dataclass(frozen=True)
class Format:
    """A number format. A scale belongs to `block` = (outputs, inputs) elements of a matrix; 0 means all of them."""

    name: str
    bits: int  # of an element
    arithmetic: str  # in which products are computed: a key of hardware.Device.peaks
    scale_bits: int = 0  # of a block's scale and zero point
    block: tuple[int, int] = (0, 0)
    input_bits: int = 0  # for each input of a matrix besides (the order of GPTQ's desc_act)

    def bytes(self, outputs: int, inputs: int) -> float:
        """Bytes of a matrix of outputs x inputs elements, its scales included."""
        bits = outputs * inputs * self.bits + inputs * self.input_bits
        if self.scale_bits:
            rows, columns = (
                -(-n // size) if size else 1 for n, size in zip((outputs, inputs), self.block, strict=True)
            )
            bits += rows * columns * self.scale_bits
        return bits / 8

    @property
    def element_bytes(self) -> float:
        """Bytes of one element without scales: of activations and of what a cache holds."""
        return self.bits / 8


FP32 = Format("fp32", 32, "fp32")
BF16 = Format("bf16", 16, "bf16")
FP16 = Format("fp16", 16, "fp16")
FP8 = Format("fp8", 8, "fp8")
INT8 = Format("int8", 8, "int8")
FP4 = Format("fp4", 4, "fp4")

# Names of dtypes in configs (torch's, and those of vLLM's --kv-cache-dtype), without a leading "torch.".
DTYPES: dict[str, Format] = {
    "float32": FP32,
    "float": FP32,
    "fp32": FP32,
    "bfloat16": BF16,
    "bf16": BF16,
    "float16": FP16,
    "half": FP16,
    "fp16": FP16,
    "fp8": FP8,
    "fp8_e4m3": FP8,
    "fp8_e5m2": FP8,
    "fp8_inc": FP8,
    "float8": FP8,
    "float8_e4m3": FP8,
    "float8_e4m3fn": FP8,
    "float8_e4m3fnuz": FP8,
    "float8_e5m2": FP8,
    "float8_e5m2fnuz": FP8,
    "int8": INT8,
    "fp4": FP4,
    "nvfp4": FP4,
    "float4_e2m1fn_x2": FP4,
}

# Of a KV cache alone, as vLLM keeps it: a block is a part of one head's vector. fp8_ds_mla: a latent of fp8 with a
# 32-bit scale for 128 numbers, and what is rotated in bf16 (vLLM, flashmla_sparse.py: 656 bytes for 512 + 64).
FP8_DS_MLA = Format("fp8_ds_mla", 8, "fp8", 32, (1, 128))
NVFP4_CACHE = Format("nvfp4", 4, "fp4", 8, (1, 16))
CACHE_DTYPES: dict[str, Format] = DTYPES | {
    "fp8_ds_mla": FP8_DS_MLA,
    "nvfp4": NVFP4_CACHE,
    "nvfp4_4over6": NVFP4_CACHE,
    "fp8_per_token_head": Format("fp8", 8, "fp8", 32, (1, 0)),
    "int8_per_token_head": Format("int8", 8, "int8", 32, (1, 0)),
}


def cache_dtype(name: str) -> Format | None:
    """The format of a KV cache by its name; None for one that is not known."""
    return CACHE_DTYPES.get(name.removeprefix("torch.").lower())


def dtype(name: object) -> Format | None:
    """The format of a dtype's name; None for one that is not known."""
    return DTYPES.get(name.removeprefix("torch.").lower()) if isinstance(name, str) else None


# Weight formats


def float8(block: tuple[int, int] = (0, 0), arithmetic: str = "fp8") -> Format:
    """Weights in 8-bit floating point with a 32-bit scale for each block."""
    return Format("fp8", 8, arithmetic, 32, block)


def mxfp4(arithmetic: str) -> Format:
    """4-bit floats, one 8-bit scale for 32: OCP Microscaling Formats (MX) Specification 1.0, 2023, section 5.2."""
    return Format("mxfp4", 4, arithmetic, 8, (1, 32))


def mxfp8(arithmetic: str) -> Format:
    """8-bit floats, one 8-bit scale for 32: OCP Microscaling Formats (MX) Specification 1.0, 2023, section 5.2."""
    return Format("mxfp8", 8, arithmetic, 8, (1, 32))


def nvfp4(arithmetic: str = "fp4", group: int = 16) -> Format:
    """4-bit floats, one fp8 scale for 16 of them (and one number for the tensor, left out): NVIDIA's NVFP4."""
    return Format("nvfp4", 4, arithmetic, 8, (1, group))


def integer(bits: int, group: int, arithmetic: str, scale_bits: int, name: str = "") -> Format:
    """Integers with a scale (and zero point) for each `group` inputs of an output; group 0: one for an output."""
    return Format(name or f"int{bits}", bits, arithmetic, scale_bits, (1, group))


@dataclass(frozen=True)
class Rule:
    """The format of the modules that a pattern matches; None: they are not quantised."""

    pattern: str
    format: Format | None


@dataclass(frozen=True)
class Quantisation:
    """What a checkpoint's quantization_config says of its weights and its KV cache."""

    method: str = ""
    linear: Format | None = None  # of the matrices that no rule names; None: as the activations
    rules: tuple[Rule, ...] = ()  # the first that matches counts
    experts_only: bool = False
    head: bool = False  # the output projection is quantised like other matrices
    kv_cache: Format | None = None
    not_understood: tuple[str, ...] = ()

    def format_of(self, module: str, plain: Format, *, expert: bool = False, head: bool = False) -> Format:
        """The format of a module's matrix, by its full name in the checkpoint; `plain` where it is not quantised."""
        for rule in self.rules:
            if matches(rule.pattern, module):
                return rule.format or plain
        if self.linear is None or (self.experts_only and not expert) or (head and not self.head):
            return plain
        return self.linear


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern of a quantization_config names a module.

    Patterns are `re:` and a regular expression (compressed-tensors), with `*` (ModelOpt), or a part of a module's
    dotted name (transformers' modules_to_not_convert).
    """
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    if "*" in pattern:
        return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
    return bool(pattern) and f".{pattern}." in f".{module}."


def quantisation(config: object, activations: Format) -> Quantisation:
    """What a quantization_config says, of the formats that vLLM and transformers read. Never raises for a JSON value.

    Fields: transformers' documentation of quantization, 2026; the compressed-tensors and ModelOpt projects' schemas.
    """
    if config is None:
        return Quantisation()
    if not isinstance(config, dict):
        return Quantisation(
            not_understood=("quantization_config is not an object: weights are taken as not quantised.",)
        )
    method = _text(config.get("quant_method")).lower()
    nested = config.get("quantization")
    if not method and isinstance(nested, dict):  # ModelOpt's own file
        return replace(_modelopt(nested, activations), method="modelopt")
    reader = next((READERS[name] for name in (method, method.split("_")[0]) if name in READERS), None)
    if reader is None:
        shown = (
            f"the quantisation method {shorten(method)}" if method else "quantization_config names no quant_method: it"
        )
        return Quantisation(
            method, not_understood=(f"{shown} is not known: weights are counted as if they were not quantised.",)
        )
    return replace(reader(config, activations), method=method)


def shorten(text: object) -> str:
    """A value from a config for a sentence, bounded."""
    shown = repr(text)
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + "..."


def _gptq(config: Mapping[str, Any], activations: Format) -> Quantisation:
    """GPTQ: a 16-bit scale and a zero point of the weights' width for each group (GPTQModel's tensors)."""
    bits, group, notes = _bits_and_group(config, ("bits",), ("group_size",))
    form = replace(
        integer(bits, group, activations.arithmetic, 16 + bits), input_bits=32 if config.get("desc_act") is True else 0
    )
    dynamic = config.get("dynamic")
    names = [key for key in dynamic if isinstance(key, str)] if isinstance(dynamic, dict) else []
    rules = tuple(Rule("re:" + name[2:], None) for name in names if name.startswith("-:"))
    if len(rules) < len(names):
        notes.append("quantization_config.dynamic gives some modules a format of their own, which is not read.")
    return Quantisation(
        linear=form, rules=rules + _kept(config), head=config.get("lm_head") is True, not_understood=tuple(notes)
    )


def _awq(config: Mapping[str, Any], activations: Format) -> Quantisation:
    """AWQ: a 16-bit scale and a zero point of the weights' width for each group (AutoAWQ's tensors)."""
    bits, group, notes = _bits_and_group(config, ("bits", "w_bit"), ("group_size", "q_group_size"))
    zero = 0 if config.get("zero_point") is False else bits
    form = integer(bits, group, activations.arithmetic, 16 + zero)
    return Quantisation(linear=form, rules=_kept(config), not_understood=tuple(notes))


def _fp8(config: Mapping[str, Any], _: Format) -> Quantisation:
    """fp8 as in DeepSeek-V3's checkpoints: blocks of weight_block_size with a 32-bit scale, else one for a tensor."""
    size = config.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(_positive(n) for n in size):
        return Quantisation(linear=float8((size[0], size[1])), rules=_kept(config))
    notes = () if size is None else (f"weight_block_size is {shorten(size)}: fp8 scales are counted as one a matrix.",)
    return Quantisation(linear=float8(), rules=_kept(config), not_understood=notes)


def _fbgemm(config: Mapping[str, Any], _: Format) -> Quantisation:
    """FBGEMM fp8: a scale for each output."""
    return Quantisation(linear=float8((1, 0)), rules=_kept(config))


def _mxfp4(config: Mapping[str, Any], activations: Format) -> Quantisation:
    """gpt-oss: the experts alone, multiplied as the activations are (vLLM, on devices without fp4 products)."""
    return Quantisation(linear=mxfp4(activations.arithmetic), rules=_kept(config), experts_only=True)


def _compressed(config: Mapping[str, Any], activations: Format) -> Quantisation:
    """compressed-tensors: config_groups of weights and input_activations, `ignore`, kv_cache_scheme."""
    groups = config.get("config_groups")
    notes: list[str] = []
    linear, rules, head = None, list(_kept(config)), True
    found = list(groups.values()) if isinstance(groups, dict) else []
    for group in found:
        scheme = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(scheme, dict):
            notes.append("a group of quantization_config.config_groups has no weights that are understood.")
            continue
        form = _scheme(scheme, group.get("input_activations"), activations)
        if form is None:
            notes.append(
                f"weights of {shorten(scheme.get('num_bits'))} bits of type {shorten(scheme.get('type'))}: not known."
            )
            continue
        targets = _strings(group.get("targets")) or ["Linear"]
        if "Linear" in targets:
            linear = form
        rules += [Rule(target, form) for target in targets if target != "Linear"]
    if not found:
        notes.append("quantization_config has no config_groups: weights are counted as if they were not quantised.")
    cache = config.get("kv_cache_scheme")
    return Quantisation(
        linear=linear,
        rules=tuple(rules),
        head=head,
        kv_cache=_cache_scheme(cache, notes),
        not_understood=tuple(notes),
    )


def _scheme(weights: Mapping[str, Any], inputs: object, activations: Format) -> Format | None:
    """The format of one scheme; products in the weights' format only where the inputs are quantised to as many bits."""
    bits, kind, strategy = weights.get("num_bits"), _text(weights.get("type")), _text(weights.get("strategy"))
    given = weights.get("group_size")
    group = given if isinstance(given, int) and _positive(given) else 0
    given_inputs = inputs if isinstance(inputs, dict) else {}
    quantised = bool(given_inputs)
    narrow = given_inputs.get("num_bits") == bits
    if kind == "float" and bits == 8:
        if strategy == "group" and group == 32:
            return mxfp8("fp8" if quantised else activations.arithmetic)
        shape = weights.get("block_structure")
        blocks = isinstance(shape, list) and len(shape) == 2 and all(_positive(n) for n in shape)
        block = (shape[0], shape[1]) if blocks and isinstance(shape, list) else (1, group) if group else (1, 0)
        return float8((0, 0) if strategy == "tensor" else block, "fp8" if quantised else activations.arithmetic)
    if kind == "float" and bits == 4:
        arithmetic = "fp4" if narrow else "fp8" if quantised else activations.arithmetic
        return mxfp4(arithmetic) if group == 32 else nvfp4(arithmetic, group or 16)
    if kind == "int" and isinstance(bits, int) and 1 <= bits <= 8:
        arithmetic = ("int8" if bits == 8 else f"int{bits}") if narrow else activations.arithmetic
        if not narrow and given_inputs.get("num_bits") == 8:
            arithmetic = "fp8" if given_inputs.get("type") == "float" else "int8"
        zero = bits if weights.get("symmetric") is False else 0
        return integer(bits, group, arithmetic, 16 + zero)
    return None


def _modelopt(config: Mapping[str, Any], activations: Format) -> Quantisation:
    """NVIDIA's ModelOpt: quant_algo for all matrices or each in quantized_layers; exclusions; the KV cache."""
    notes: list[str] = []
    algorithm = _text(config.get("quant_algo")).upper()
    linear, rules = _algorithm(algorithm, config, activations), list(_kept(config))
    layers = config.get("quantized_layers")
    if isinstance(layers, dict):
        for name, each in layers.items():
            form = (
                _algorithm(_text(each.get("quant_algo")).upper(), each, activations) if isinstance(each, dict) else None
            )
            rules.append(Rule(str(name), form))
    elif linear is None and isinstance(config.get("config_groups"), dict):
        compressed = _compressed(config, activations)
        return replace(compressed, rules=tuple(rules) + compressed.rules)
    elif linear is None:
        notes.append(f"ModelOpt's quant_algo {shorten(algorithm)} is not known: weights are counted as not quantised.")
    scheme, algorithm = config.get("kv_cache_scheme"), _text(config.get("kv_cache_quant_algo")).upper()
    cache = {"FP8": FP8, "INT8": INT8, "NVFP4": NVFP4_CACHE}.get(algorithm) or _cache_scheme(scheme, notes)
    return Quantisation(linear=linear, rules=tuple(rules), head=True, kv_cache=cache, not_understood=tuple(notes))


def _algorithm(name: str, config: Mapping[str, Any], activations: Format) -> Format | None:
    group = config.get("group_size")
    size = group if isinstance(group, int) and _positive(group) else 0
    if name in ("FP8", "FP8_PER_TENSOR"):
        return float8()
    if name in ("FP8_PB_WO", "FP8_PB_REAL"):
        return float8((128, 128))
    if name == "FP8_PER_CHANNEL_PER_TOKEN":
        return float8((1, 0))
    if name in ("NVFP4", "NVFP4_AWQ", "W4A4_NVFP4"):
        return nvfp4(group=size or 16)
    if name == "W4A16_NVFP4":
        return nvfp4(activations.arithmetic, size or 16)
    if name == "MXFP4":
        return mxfp4("fp4")
    if name == "MXFP8":
        return mxfp8("fp8")
    if name in ("W4A16", "W4A16_AWQ"):
        return integer(4, size or 128, activations.arithmetic, 16)
    if name == "W4A8_AWQ":
        return integer(4, size or 128, "fp8", 16)
    if name == "INT8_SQ":
        return integer(8, 0, "int8", 32)
    return None


def _bitsandbytes(config: Mapping[str, Any], activations: Format) -> Quantisation:
    """4 bits: a scale for 64 weights, of 32 bits or, quantised once more, of 8 and 32 for 256 of them (QLoRA, 2023)."""
    rules = tuple(Rule(name, None) for name in _strings(config.get("llm_int8_skip_modules")))
    if config.get("load_in_8bit") is True:
        return Quantisation(linear=integer(8, 0, "int8", 32), rules=rules)
    kind = _text(config.get("bnb_4bit_quant_type")) or "fp4"
    bits = 8 if config.get("bnb_4bit_use_double_quant") is True else 32
    return Quantisation(linear=integer(4, 64, activations.arithmetic, bits, name=kind[:8]), rules=rules)


def _quark(config: Mapping[str, Any], activations: Format) -> Quantisation:
    """AMD's Quark: global_quant_config with weight and input_tensors; `exclude`."""
    overall = config.get("global_quant_config")
    notes: list[str] = []
    parts = overall if isinstance(overall, dict) else {}
    weight = parts.get("weight")
    scheme = weight[0] if isinstance(weight, list) and weight else weight
    scheme = scheme if isinstance(scheme, dict) else {}
    narrow = parts.get("input_tensors") is not None
    kind, group = _text(scheme.get("dtype")).lower(), scheme.get("group_size")
    size = group if isinstance(group, int) and _positive(group) else 0
    linear: Format | None = None
    if kind.startswith("fp8"):
        linear = float8(
            (1, 0) if "channel" in _text(scheme.get("qscheme")) else (0, 0), "fp8" if narrow else activations.arithmetic
        )
    elif kind in ("fp4", "mxfp4"):
        linear = mxfp4("fp4" if narrow else activations.arithmetic)
    elif kind in ("int4", "uint4"):
        linear = integer(4, size, activations.arithmetic, 16)
    elif kind == "int8":
        linear = integer(8, size, "int8" if narrow else activations.arithmetic, 32)
    else:
        notes.append(f"Quark's weights of dtype {shorten(kind)} are not known: they are counted as not quantised.")
    if config.get("layer_quant_config"):
        notes.append(
            "quantization_config.layer_quant_config gives some modules a format of their own, which is not read."
        )
    cache = config.get("kv_cache_group")
    return Quantisation(
        linear=linear,
        rules=_kept(config),
        head=True,
        kv_cache=FP8 if isinstance(cache, list) and cache else None,
        not_understood=tuple(notes),
    )


READERS: dict[str, Callable[[Mapping[str, Any], Format], Quantisation]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm": _fbgemm,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "quark": _quark,
}


def _kept(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The modules that are not quantised, under the names that the methods give the list."""
    keys = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude", "exclude_modules")
    return tuple(Rule(name, None) for key in keys for name in _strings(config.get(key)))


def _cache_scheme(scheme: object, notes: list[str]) -> Format | None:
    if scheme is None:
        return None
    known = {(8, "float"): FP8, (8, "int"): INT8, (4, "float"): NVFP4_CACHE}
    found = None
    if isinstance(scheme, dict) and isinstance(scheme.get("num_bits"), int):
        found = known.get((scheme["num_bits"], _text(scheme.get("type"))))
    if found is None:
        notes.append("quantization_config.kv_cache_scheme is not understood: the KV cache is counted as not quantised.")
    return found


def _bits_and_group(
    config: Mapping[str, Any], bits: Iterable[str], groups: Iterable[str]
) -> tuple[int, int, list[str]]:
    notes = []
    width = next((config[name] for name in bits if name in config), None)
    if not isinstance(width, int) or not 1 <= width <= 16 or isinstance(width, bool):
        notes.append(f"the weights' bits are {shorten(width)}: counted as 4.")
        width = 4
    group = next((config[name] for name in groups if name in config), None)
    if not isinstance(group, int) or isinstance(group, bool) or group < -1 or group == 0:
        notes.append(f"the weights' group_size is {shorten(group)}: counted as one group for each output.")
        group = -1
    return width, max(group, 0), notes


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _strings(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
