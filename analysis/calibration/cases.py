"""What `stagetrace calibrate` measures: the components of a step, each alone. Data, and the torch calls that do it.

Imported by the program that measures (measure.py), in an environment that has torch and need not have anything else:
standard library and torch alone. torch is the only engine, so that NVIDIA, AMD and processors run the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMPONENTS = ("memory", "gemm", "attention", "experts", "collective")
COLLECTIVE = COMPONENTS[-1]
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Unsupported(Exception):
    """The device, or this torch, cannot do it; the message says why."""


@dataclass(frozen=True, eq=False)
class Case:
    """One measurement: a call, and how much it does."""

    component: str  # of COMPONENTS
    op: str  # read, write, copy; linear; prefill, decode; grouped; all_reduce, ...
    arithmetic: str  # fp32, tf32, bf16, fp16, fp8, int8; empty where nothing is computed
    size: str  # for people: 64 MiB, 1024 x 4096 x 4096, ...
    bytes: int  # read and written, the least that the result needs; of a collective those that nccl-tests counts
    operations: int  # multiplications and additions
    make: Callable[[Any, Any], Callable[[], object]]  # (torch, device) -> the call; raises Unsupported
    ranks: int = 1
    kernel: str = ""  # the torch function, where several can do the op
    shape: dict[str, int] = field(default_factory=dict)


def size_text(count: int) -> str:
    """Bytes as people write them: powers of two."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count // unit} {name}"
    return f"{count} B"


DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
_WIDTHS = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


def memory(limit: int, quick: bool) -> Iterator[Case]:
    """Read, write and copy over sizes from what a core's own cache holds to what none does."""
    count = 32 * KIB
    while count <= limit:
        yield from (
            Case("memory", op, "", size_text(count), moved * count, 0, _memory(kernel, count), kernel=kernel)
            for op, kernel, moved in (
                ("read", "sum", 1),
                ("read", "dot", 1),
                ("write", "fill_", 1),
                ("copy", "copy_", 2),
            )
        )
        count *= 4 if quick else 2


def _memory(kernel: str, count: int) -> Callable[[Any, Any], Callable[[], object]]:
    def make(torch: Any, device: Any) -> Callable[[], object]:
        source = torch.ones(count // 4, device=device, dtype=torch.float32)
        if kernel == "sum":
            return source.sum  # type: ignore[no-any-return]
        if kernel == "dot":
            return lambda: torch.dot(source, source)
        if kernel == "fill_":
            return lambda: source.fill_(1.0)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return make


def gemm(accelerator: bool, quick: bool) -> Iterator[Case]:
    """Products of activations and weights as a layer has them: few rows (decode) to many (prefill), by arithmetic."""
    width = 8192 if accelerator else 2048
    rows = (1, 64, 1024) if quick else (1, 8, 64, 256, 1024, 4096)
    squares = (512, 1024, 2048) if quick else (512, 1024, 2048, 4096)
    shapes = [(n, n, n) for n in (*squares, *([8192, 16384] if accelerator and not quick else []))]
    shapes = sorted({*((m, width, width) for m in rows), *shapes}, key=lambda shape: shape[0] * shape[1] * shape[2])
    for arithmetic in ("fp32", "tf32", "bf16", "fp16", "fp8", "int8"):
        width_bytes = _WIDTHS[arithmetic]
        for m, k, n in shapes:
            out = 4 if arithmetic == "int8" else 2 if arithmetic == "fp8" else width_bytes
            yield Case(
                "gemm",
                "linear",
                arithmetic,
                f"{m} x {k} x {n}",
                (m * k + k * n) * width_bytes + m * n * out,
                2 * m * k * n,
                _gemm(arithmetic, m, k, n),
                shape={"m": m, "k": k, "n": n},
            )


def _gemm(arithmetic: str, m: int, k: int, n: int) -> Callable[[Any, Any], Callable[[], object]]:
    def make(torch: Any, device: Any) -> Callable[[], object]:
        if arithmetic == "tf32" and device.type == "cpu":
            raise Unsupported("a processor has no tf32")
        if arithmetic == "fp8":
            return _scaled(torch, device, m, k, n)
        if arithmetic == "int8":
            if device.type != "cpu" and m <= 16:
                raise Unsupported("torch._int_mm takes more than 16 rows on this device")
            left = torch.ones((m, k), device=device, dtype=torch.int8)
            right = torch.ones((n, k), device=device, dtype=torch.int8).t()
            return lambda: torch._int_mm(left, right)
        dtype = getattr(torch, DTYPES[arithmetic])
        activations = torch.randn((m, k), device=device, dtype=torch.float32).to(dtype)
        weights = torch.randn((n, k), device=device, dtype=torch.float32).to(dtype)
        linear = torch.nn.functional.linear
        if device.type == "cpu":
            return lambda: linear(activations, weights)
        allow = arithmetic == "tf32"

        def run() -> object:
            torch.backends.cuda.matmul.allow_tf32 = allow
            return linear(activations, weights)

        return run

    return make


def _scaled(torch: Any, device: Any, m: int, k: int, n: int) -> Callable[[], object]:
    if device.type == "cpu":
        raise Unsupported("torch._scaled_mm in fp8 is for GPUs")
    kind = torch.float8_e4m3fnuz if "gfx94" in _architecture(torch, device) else torch.float8_e4m3fn
    left = torch.randn((m, k), device=device).to(kind)
    right = torch.randn((n, k), device=device).to(kind).t()
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(left, right, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)


def _architecture(torch: Any, device: Any) -> str:
    return str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", ""))


def attention(accelerator: bool, quick: bool) -> Iterator[Case]:
    """Causal attention of a prompt with itself, and of one new token a request with its context."""
    heads, width = (32, 128) if accelerator else (8, 128)
    arithmetics = ("bf16",) if accelerator else ("fp32", "bf16")
    lengths = (512, 2048) if quick else (256, 512, 1024, 2048, 4096)
    for arithmetic in arithmetics:
        size = _WIDTHS[arithmetic]
        for length in lengths:
            yield Case(
                "attention",
                "prefill",
                arithmetic,
                f"{length} tokens, {heads} heads",
                4 * length * heads * width * size,
                4 * heads * width * (length * (length + 1) // 2),
                _attention(arithmetic, 1, heads, length, length, width),
                shape={"batch": 1, "heads": heads, "q": length, "kv": length, "width": width},
            )
        for batch, context in ((1, 1024), (8, 1024)) if quick else ((1, 1024), (8, 1024), (8, 4096), (64, 1024)):
            yield Case(
                "attention",
                "decode",
                arithmetic,
                f"{batch} requests, context {context}, {heads} heads",
                2 * batch * context * heads * width * size,
                4 * batch * heads * width * context,
                _attention(arithmetic, batch, heads, 1, context, width),
                shape={"batch": batch, "heads": heads, "q": 1, "kv": context, "width": width},
            )


def _attention(
    arithmetic: str, batch: int, heads: int, q: int, kv: int, width: int
) -> Callable[[Any, Any], Callable[[], object]]:
    def make(torch: Any, device: Any) -> Callable[[], object]:
        dtype = getattr(torch, DTYPES[arithmetic])
        query = torch.randn((batch, heads, q, width), device=device, dtype=torch.float32).to(dtype)
        keys = torch.randn((batch, heads, kv, width), device=device, dtype=torch.float32).to(dtype)
        values = torch.randn_like(keys)
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(query, keys, values, is_causal=q > 1)

    return make


def experts(accelerator: bool, quick: bool) -> Iterator[Case]:
    """One matrix of every expert times that expert's tokens, all experts in one grouped product."""
    count, hidden, inner = (64, 4096, 2048) if accelerator else (8, 1024, 1024)
    for tokens in (count, 32 * count) if quick else (count, 8 * count, 32 * count, 128 * count):
        yield Case(
            "experts",
            "grouped",
            "bf16",
            f"{count} experts, {tokens} tokens, {hidden} x {inner}",
            2 * (count * hidden * inner + tokens * (hidden + inner)),
            2 * tokens * hidden * inner,
            _experts(count, tokens, hidden, inner),
            kernel="grouped_mm",
            shape={"experts": count, "tokens": tokens, "k": hidden, "n": inner},
        )


def _experts(count: int, tokens: int, hidden: int, inner: int) -> Callable[[Any, Any], Callable[[], object]]:
    def make(torch: Any, device: Any) -> Callable[[], object]:
        grouped = getattr(torch.nn.functional, "grouped_mm", None)
        if grouped is None:
            raise Unsupported("this torch has no torch.nn.functional.grouped_mm: 2.10 or newer has")
        activations = torch.randn((tokens, hidden), device=device, dtype=torch.float32).to(torch.bfloat16)
        weights = torch.randn((count, hidden, inner), device=device, dtype=torch.float32).to(torch.bfloat16)
        ends = torch.arange(1, count + 1, device=device, dtype=torch.int32) * (tokens // count)
        return lambda: grouped(activations, weights, offs=ends)

    return make


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def collectives(ranks: int, accelerator: bool, quick: bool) -> Iterator[Case]:
    """The operations that ranks exchange activations with, over sizes; run on every rank at once."""
    last = (256 if accelerator else 16) * MIB
    for op in COLLECTIVES:
        count = 4 * KIB
        while count <= last:
            yield Case(COLLECTIVE, op, "", size_text(count), count, 0, _collective(op, count, ranks), ranks=ranks)
            count *= 16 if quick else 4


def _collective(op: str, count: int, ranks: int) -> Callable[[Any, Any], Callable[[], object]]:
    def make(torch: Any, device: Any) -> Callable[[], object]:
        group = torch.distributed
        whole = torch.zeros(count // 4 // ranks * ranks, device=device, dtype=torch.float32)
        part = torch.zeros(len(whole) // ranks, device=device, dtype=torch.float32)
        if op == "all_reduce":
            return lambda: group.all_reduce(whole)
        if op == "all_gather":  # torch 2.13 renamed these two
            gather = getattr(group, "all_gather_single", None) or group.all_gather_into_tensor
            return lambda: gather(whole, part)
        if op == "reduce_scatter":
            scatter = getattr(group, "reduce_scatter_single", None) or group.reduce_scatter_tensor
            return lambda: scatter(part, whole)
        if op == "broadcast":
            return lambda: group.broadcast(whole, src=0)
        target = torch.empty_like(whole)
        return lambda: group.all_to_all_single(target, whole)

    return make
