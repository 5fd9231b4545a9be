"""The mark: a kernel of one thread that notes the device's own time. Imported only where marks are used: it has Triton.

A stream can capture it into a graph, which then notes the time in every replay, where no Python runs. Under Triton's
interpreter, where there is no timer, it takes the time from memory.

Of what it takes itself little is to be in a span: a mark that begins one reads the timer as the last thing before it
writes, one that ends one as the first.
"""

# Triton reads the kernels' own source: what stands in an annotation it would have to know.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

NONE, CUDA, HIP = range(3)  # which timer


@triton.jit
def _no_time():
    return 0


# Chosen here, since a kernel may only name what its target has.
_globaltimer = getattr(getattr(tl.extra, "cuda", None), "globaltimer", _no_time)
_memrealtime = getattr(getattr(tl.extra, "hip", None), "memrealtime", _no_time)


@triton.jit
def _cuda_time_after(positive):
    """CUDA's timer, read once a value is there, which is above 0."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred there; setp.gt.s64 there, $1, 0; @there mov.u64 $0, %globaltimer; }",
        "=l,l",
        [positive],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["index"])
def mark_kernel(ring, counter, clock, index, marks: tl.constexpr, depth: tl.constexpr, timer: tl.constexpr):
    """Notes time and step in the mark's place in the step's row. int64 all: ring (depth, marks, 3), counter (1).

    A mark of an even index begins a span.
    """
    begins = index % 2 == 0
    time = tl.full((), 0, tl.int64)
    if timer == 1:  # noqa: SIM102 - known when the kernel is compiled, the next is not
        if not begins:
            time = _globaltimer()
    step = tl.load(counter)
    at = ring + ((step % depth) * marks + index) * 3
    noted = tl.load(at + 1)
    times = tl.load(at + 2)
    times = tl.where(noted == step, times + 1, 1)
    if timer == 1:
        if begins:
            time = _cuda_time_after(times)
    elif timer == 2:
        time = _memrealtime() * 10  # ns of a tick of AMD's constant clock, 100 MHz
    else:
        time = tl.load(clock)
    tl.store(at, time)
    tl.store(at + 2, times)
    tl.store(at + 1, step)
