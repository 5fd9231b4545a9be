"""The binary format: a ring file's header, its slots, and the records in them; writer and reader share this table.

Little-endian. A slot is 128 bytes: sequence number, header word, 13 signed words, the sequence number again. A slot
whose two numbers differ is torn. A record of more than 13 words takes several slots; each part then begins with the
record's id (the sequence number of its first part) and carries 12 words of the record.
"""

from __future__ import annotations

import struct
from enum import IntEnum

VERSION = 1
MAGIC = b"stagetr\x01"

SLOT_SIZE = 128
SLOT_WORDS = 13
PART_WORDS = SLOT_WORDS - 1
SLOT = struct.Struct("<QQ13qQ")
# The same slot in other groups of words, which are faster to pack: the fewer values, the better.
SHORT_SLOT = struct.Struct("<QQ8q40xQ")  # the last five words are zero
STATE_SLOT = struct.Struct("<QQ9q32xQ")  # the last four
PACKED_SLOT = struct.Struct("<Q16sqq80sQ")  # head and tail, as below, are packed already
PART_SLOT = struct.Struct(f"<QQQ{8 * PART_WORDS}sQ")  # a part of a long record

HEAD = struct.Struct("<Qq")
"""Header word and thread: the head of a segment or a step's end."""
TAILS = tuple(struct.Struct(f"<{2 + count}q") for count in range(9))
"""Engine instance, step, and so many attributes: the tail of a segment or a step's end."""

# The file's header page: constants when the file appears, then words that change. Every changing word has one writer
# and a cache line of its own.
HEADER_SIZE = 4096
HEADER = struct.Struct("<8sIIIIQqqI32s32s64s")
"""magic, version, slot size, control slots, detail slots, pid, started, wall, maximum level, role, session, host"""
LEVEL_OFFSET = 512  # one byte: stages.Level; written by `stagetrace ctl` once the ring is in place
EPOCH_OFFSET = 516  # u32: how often the level was switched; written before the level
CONTROL_READ_OFFSET = 1024  # u64: control slots that the collector has committed; written by the collector
CONTROL_DROPPED_OFFSET = 1088  # two u64, by the engine: control records dropped, the slot before which the last was
ERRORS_OFFSET = 2048  # u64 each: contained errors by hook, in the order of the process's hook table
MAX_HOOKS = (HEADER_SIZE - ERRORS_OFFSET) // 8

MAX_TEXT = 16 * 1024  # bytes of a text record; longer ones are cut
MAX_NAME = 128  # bytes of the text of a name

EXPERTS_HEAD = struct.Struct("<7q")
"""The words of a record of experts before its counts."""
COUNT_BYTES = (1, 2, 4)  # that a count can have, unsigned


class RecordType(IntEnum):
    """What a record is; its words in order."""

    SEGMENT = 1  # thread, begin ns, end ns, instance, step, a0 ... a7; the header word has the stage
    STATE = 2  # thread, ns, request, instance, step, a0 ... a7; the request enters the state that is the stage
    EVENT = 3  # thread, ns, request, instance, step, a0 ... a7; the header word has the event
    STEP_BEGIN = 4  # thread, begin ns, end of schedule ns, instance, step, then stages.STEP_COMPOSITION
    STEP_END = 5  # thread, end ns, spare, instance, step, then stages.STEP_RESULT where the engine says more
    MEMBER = 6  # request, q, kv, instance, step, last, cached; the header word has the change
    SNAPSHOT = 7  # instance, step, count, then the requests in the step
    TEXT = 8  # handle, kind, length in bytes, then the UTF-8 bytes, padded to words
    EXPERTS = 9  # instance, step, rank, layer, tokens, experts, bytes per count, then a count for each expert, padded


class Event(IntEnum):
    """Moments of a request that begin no state of the engine's."""

    FIRST_OUTPUT = 1  # the front end had the first token
    FIRST_SENT = 2  # the first bytes were handed to the client's socket
    LAST_OUTPUT = 3  # the front end saw it finished; a0 stages.Finish, a1 output, a2 prompt, a3 cached tokens
    LAST_SENT = 4  # the last byte was handed to the client's socket; a0 the body's bytes, a1 unsent, if a2 is 1
    FINISHED = 5  # the engine ended it; a0 stages.Finish, a1 output, a2 prompt tokens, a3 preemptions
    ABORTED = 6  # the front end gave it up: client gone, or an abort call
    CHILD = 7  # one of several answers to one request (n > 1); a0 the parent's handle, a1 index, a2 how many
    DRAFTED = 8  # at its end, where the engine kept count; a0 draft tokens verified, a1 accepted of them
    WAITED = 9  # at the end of its queue, one for each cause; a0 stages.QueueCause, a1 ns of the queue, in all
    REFUSED = 10  # the front end answered it with an error, no engine has seen it; a0 the HTTP status


class Change(IntEnum):
    """What a member record says of a request at a step."""

    JOIN = 1  # takes part from this step on, in decode
    LEAVE = 2  # takes part no longer from this step on
    CHUNK = 3  # takes part (and joins, if it was not in) with a prefill chunk
    DROPPED = 4  # took part in the step and gets no token of it: it was aborted while the step ran


class Text(IntEnum):
    """What the string of a text record is."""

    REQUEST_ID = 1  # the engine's own id of a request; the handle is its hash
    EXTERNAL_ID = 2  # the id of that request that the client sees
    TRACE_CONTEXT = 3  # traceparent, a newline, tracestate
    PROCESS = 4  # JSON: what the process is (engine, version, model, flags, rank)
    HOOK = 5  # JSON: a hook point and what became of it
    LORA = 6  # the name of the LoRA adapter that a request asked for
    NAME = 7  # the name of a thing of the engine's: a group of ranks, an algorithm


def header_word(type_: int, stage: int = 0, part: int = 0, parts: int = 1) -> int:
    """A slot's header word: type, part, parts and a spare byte, then the stage (or event, or change)."""
    return type_ | part << 8 | parts << 16 | stage << 32
