"""Follows a session and sends its tables to one backend: resumes where it stopped, waits for a backend that is away.

The session is the spool: nothing is held here but what is being sent. A commit counts as sent when the backend
confirmed every span of it, so after a death some are sent again, with the same ids. A request that the backend refuses
several times while it takes others is given up and counted; one that fails while all fail is tried until it arrives.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Protocol

import pyarrow as pa

from .metrics import MetricsSink
from .otel_settings import reading
from .otlp import OtlpSink
from .parts import END
from .session import TABLES, Export, Manifest, Session, SessionError
from .span_sink import BadSettings, batches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .otel_settings import Destination
    from .sampling import Rules
    from .span_sink import SpanSink
    from .spans import Span

    Tables = Mapping[str, pa.Table]
    Enrich = Callable[[Tables, Manifest], Tables]

log = logging.getLogger(__name__)

LOOK_S = 0.5  # between looks for new commits
PAUSE_S = (0.5, 30.0)  # while nothing arrives: the first pause, doubled up to the second
REFUSALS = 3  # of one request, with others accepted in between
_MOST_QUEUED = 64  # requests
_MOST_REMEMBERED = 2_000  # commits whose states and members are looked up again for requests that are not over
_MOST_DECIDED = 64  # commits for which it is decided again what is sampled: their requests' steps may come later
_SAVE_S = 1.0


class Taken(Exception):
    """Another process exports this session to the same destination."""


class Target(Protocol):
    """Where spans go, as the follower needs to know it."""

    @property
    def name(self) -> str:
        """A short name that is the same for the same destination."""

    @property
    def target(self) -> str:
        """The destination in words, without credentials."""


@dataclass
class _Request:
    """Spans that go in one request to the backend."""

    commit: int
    spans: Sequence[Span]
    refusals: int = 0
    accepted_before: int = 0  # how many requests had been accepted at its last attempt


class Follower:
    """Sends one session to one destination. Raises Taken when another process does.

    `enrich` adds columns to a commit's tables before spans and metrics are made of them (spans.STEP_LIGHT): what it
    knows is the analysis's, of which this package knows nothing.
    """

    def __init__(
        self,
        session: Session,
        sink: SpanSink,
        destination: Target,
        metrics: MetricsSink | None = None,
        enrich: Enrich | None = None,
    ):
        self.session = session
        self.sink = sink
        self.metrics = metrics
        self._enrich = enrich
        self.name = destination.name
        self.state = session.read_exports().get(self.name, Export(destination.target))
        self.state.trouble = ""
        session.write_export(self.name, self.state)
        self._lock = self._claim()
        self._queue: deque[_Request] = deque()
        self._read = self.state.commit  # the last commit whose requests are in the queue, or sent
        self._accepted = 0
        self._pause_s = 0.0
        self._resume_at = 0.0
        self._saved_at = 0.0
        self._end_read = False
        self._steps: dict[int, dict[int, tuple[int, int]]] = {}  # by commit, see _note_steps
        self.manifest = Manifest()

    def _claim(self) -> IO[bytes]:
        lock = open(self.session.path / "exports" / f"{self.name}.lock", "wb")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise Taken(f"another process exports it to {self.state.target}") from None
        return lock

    def restart(self) -> None:
        """Sends everything from the first commit on again."""
        self.state = Export(self.state.target)
        self._read = 0

    def remember(self) -> None:
        """Looks up what requests that are not over had in commits that were sent already."""
        self.manifest = self.session.read_manifest()
        names, last = ("requests", "states", "members"), self.state.commit
        first = max(self.manifest.rotated + 1, last - _MOST_REMEMBERED + 1)
        decided = last + 1
        if self.sink.sampler is not None:
            decided = max(first, last - _MOST_DECIDED + 1)
            early = self.session.read_table("requests", numbers=(self.manifest.rotated + 1, first - 1))
            self.sink.remember({"requests": early})
        if first < decided:
            self.sink.remember({name: self.session.read_table(name, numbers=(first, decided - 1)) for name in names})
        for number in range(decided, last + 1):
            tables = {name: self.session.read_table(name, numbers=(number, number)) for name in names}
            self.sink.remember(tables, decide=True)

    @property
    def waiting(self) -> int:
        """How many commits' tables the backend does not have."""
        return max(self.manifest.derived - self.state.commit, 0)

    @property
    def done(self) -> bool:
        """Whether the backend has all that there is, and nothing more will come."""
        return self.manifest.complete and self.state.end and not self._queue and not self.waiting

    def follow(self, told: Callable[[], bool], progress: Callable[[Follower], None] | None = None) -> None:
        """Sends what comes until the session is complete and sent, or until `told`. Raises SessionError or OSError."""
        while not told():
            moved = self.step()
            if progress is not None:
                progress(self)
            if self.done:
                break
            if not moved:
                time.sleep(min(LOOK_S, 0.05 if self.manifest.complete else LOOK_S))
            if self.metrics is not None and not self.state.trouble:
                self.metrics.send(self.manifest, self.state)
        self._save(now=True)
        if self.metrics is not None and self.done:
            self.metrics.send(self.manifest, self.state, last=True)
            self._save(now=True)  # with what the metrics were told

    def step(self) -> bool:
        """Reads the next commit if there is room, and sends one request. Whether there was anything to do."""
        self._fill()
        if not self._queue or time.monotonic() < self._resume_at:
            self._save()
            return False
        request = self._queue.popleft()
        if self.sink.send(request.spans):
            self._accepted += 1
            self.state.sent += len(request.spans)
            self._arrives()
        else:
            self._failed(request)
        self._advance()
        self._save()
        return True

    def _fill(self) -> None:
        if len(self._queue) >= _MOST_QUEUED:
            return
        if self._read >= self.manifest.derived:
            self.manifest = self.session.read_manifest()
            if not self.manifest.complete:
                self.state.end = self._end_read = False
        if self._read < self.manifest.rotated:  # it was away for longer than the session is kept
            self._leave_out(Counter(commits_rotated=self.manifest.rotated - self._read))
            self._read = self.manifest.rotated
        if self._read < self.manifest.derived:
            self._read += 1
            self._queue_commit(self._read)
        elif self.manifest.complete and not self.state.end and not self._end_read:
            self._end_read = True
            self._queue_commit(END)
        else:
            return
        self._advance()

    def _queue_commit(self, number: int) -> None:
        tables = {name: self.session.read_table(name, numbers=(number, number)) for name in TABLES}
        rows = sum(table.num_rows for table in tables.values())
        if not rows:
            return
        self.manifest = self.session.read_manifest()  # it knows the clocks and processes of these tables
        try:
            lit = self._enriched(number, tables)
            made = self.sink.spans(lit, self.manifest)
        except Exception:  # or it would stop at this commit for good
            log.exception("no spans could be made of commit %d", number)
            self._leave_out(Counter(rows_that_failed=rows))
            return
        if self.metrics is not None:
            self.metrics.add(lit, self.manifest)
        self._leave_out(made.left_out)
        self._queue.extend(_Request(number, spans) for spans in batches(made.spans))
        if self.sink.sampler is not None:
            self._note_steps(number, tables)
            self._queue_steps(number, set(made.wanted))

    def _note_steps(self, number: int, tables: Tables) -> dict[int, tuple[int, int]]:
        """Which steps a commit has rows of: of each engine instance the first and the last."""
        found: dict[int, tuple[int, int]] = {}
        for name in ("steps", "segments"):
            pairs = tables[name].select(["instance", "step"]).drop_null().group_by("instance")
            for row in pairs.aggregate([("step", "min"), ("step", "max")]).to_pylist():
                first, last = found.get(row["instance"], (row["step_min"], row["step_max"]))
                found[row["instance"]] = min(first, row["step_min"]), max(last, row["step_max"])
        self._steps[number] = found
        while len(self._steps) > _MOST_REMEMBERED:
            del self._steps[next(iter(self._steps))]
        return found

    def _queue_steps(self, number: int, wanted: set[tuple[int, int]]) -> None:
        """Steps that were not sampled when their commit was read, and that a request of this commit took part in."""
        earlier = min(number, self.manifest.derived + 1) - 1
        last = max(self.manifest.rotated, earlier - _MOST_REMEMBERED)
        missing = set(wanted)
        for before in range(earlier, last, -1) if wanted else ():
            tables: Tables | None = None
            held = self._steps.get(before)
            if held is None:
                tables = self._of_steps(before)
                held = self._note_steps(before, tables)
            here = {each for each in wanted if each[0] in held and held[each[0]][0] <= each[1] <= held[each[0]][1]}
            if here:
                made = self.sink.steps(self._enriched(before, tables or self._of_steps(before)), self.manifest, here)
                self._leave_out(made.left_out)
                self._queue.extend(_Request(number, spans) for spans in batches(made.spans))
                missing -= here
            elif not missing:
                break

    def _of_steps(self, number: int) -> Tables:
        tables = {name: TABLES[name].empty_table() for name in TABLES}
        for name in ("steps", "segments", "experts"):
            tables[name] = self.session.read_table(name, numbers=(number, number))
        return tables

    def _enriched(self, number: int, tables: Tables) -> Tables:
        if self._enrich is None:
            return tables
        try:
            return self._enrich(tables, self.manifest)
        except Exception:
            log.exception("the spans of commit %d, and of all that follow, go without the speed of light", number)
            self._enrich = None
            return tables

    def _leave_out(self, reasons: Counter[str]) -> None:
        for reason, count in reasons.items():
            self.state.left_out[reason] = self.state.left_out.get(reason, 0) + count

    def _failed(self, request: _Request) -> None:
        if self._accepted > request.accepted_before and request.accepted_before:
            request.refusals += 1
        request.accepted_before = max(self._accepted, 1)
        if request.refusals >= REFUSALS:
            self.state.refused += len(request.spans)
            log.error(
                "%s refuses %d spans and takes others: they are given up (%s)",
                self.state.target,
                len(request.spans),
                self.sink.why,
            )
            return
        self._queue.append(request)
        if not self.state.trouble:
            self.state.trouble = self.sink.why or "no answer"
            log.warning(
                "spans do not reach %s (%s). They stay in the session and are sent when it takes them. %s",
                self.state.target,
                self.state.trouble,
                self.sink.remedy or self.sink.usual,
            )
        first, longest = PAUSE_S
        self._pause_s = min(max(self._pause_s * 2, first), longest)
        self._resume_at = time.monotonic() + self._pause_s

    def _arrives(self) -> None:
        self._pause_s = 0.0
        if self.state.trouble:
            self.state.trouble = ""
            log.warning("spans arrive at %s again", self.state.target)

    def _advance(self) -> None:
        """A commit is sent when no request of it, or of one before it, is left."""
        oldest = min((request.commit for request in self._queue), default=END + 1)
        self.state.commit = max(self.state.commit, min(self._read, oldest - 1))
        self.state.end = self._end_read and not self._queue

    def _save(self, now: bool = False) -> None:
        if now or time.monotonic() - self._saved_at > _SAVE_S:
            self.session.write_export(self.name, self.state)
            self._saved_at = time.monotonic()

    def close(self) -> None:
        """Lets go of the connection and of the claim."""
        self.sink.shutdown()
        if self.metrics is not None:
            self.metrics.shutdown()
        self._lock.close()


def follow_session(
    session: Session,
    destination: Destination,
    metrics: Destination | None,
    told: Callable[[], bool],
    enrich: Enrich | None = None,
    rules: Rules | None = None,
) -> int:
    """The export process of a collector: follows until told. Its exit status: 0, or 2 where it makes no sense again.

    `metrics` is where the counts of what was lost and sent go.

    Raises what the OpenTelemetry SDK raises for variables that it cannot use (BadSettings).
    """
    sink = OtlpSink.to(destination, session.identity.key, rules=rules)
    try:
        counts = None if metrics is None else MetricsSink(metrics, session.identity.key, reading(os.environ))
        follower = Follower(session, sink, destination, counts, enrich)
    except Taken as error:
        log.error("%s", error)
        return 2
    except Exception as error:  # a mistake in a variable, say
        raise BadSettings(f"no metrics can be exported: {error}") from error
    try:
        follower.remember()
        follower.follow(told)
    except (SessionError, OSError, pa.ArrowException) as error:
        log.error("the export of %s stops: %s", session.path, error)
        return 1
    finally:
        follower.close()
    return 0
