"""Follows a session and sends its tables to one backend: resumes where it stopped, waits for a backend that is away.

The session is the spool: nothing is held here but what is being sent. A commit counts as sent when the backend
confirmed every span of it, so after a death some are sent again, with the same ids. A request that the backend refuses
several times while it takes others is given up and counted; one that fails while all fail is tried until it arrives.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import pyarrow as pa

from .metrics import MetricsSink
from .otlp import REQUEST_S, BadSettings, OtlpSink, batches
from .parts import END
from .session import TABLES, Export, Manifest, Session, SessionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from .otel_settings import Destination

    Tables = Mapping[str, pa.Table]
    Enrich = Callable[[Tables, Manifest], Tables]

log = logging.getLogger(__name__)

LOOK_S = 0.5  # between looks for new commits
PAUSE_S = (0.5, 30.0)  # while nothing arrives: the first pause, doubled up to the second
REFUSALS = 3  # of one request, with others accepted in between
_MOST_QUEUED = 64  # requests
_MOST_REMEMBERED = 2_000  # commits whose states and members are looked up again for requests that are not over
_SAVE_S = 1.0


class Taken(Exception):
    """Another process exports this session to the same destination."""


@dataclass
class _Request:
    """Spans that go in one request to the backend."""

    commit: int
    spans: Sequence[ReadableSpan]
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
        sink: OtlpSink,
        destination: Destination,
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
        first = max(self.manifest.rotated + 1, self.state.commit - _MOST_REMEMBERED + 1)
        if first <= self.state.commit:
            names, numbers = ("requests", "states", "members"), (first, self.state.commit)
            self.sink.remember({name: self.session.read_table(name, numbers=numbers) for name in names})

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
            self.metrics.add(lit)
        self._leave_out(made.left_out)
        self._queue.extend(_Request(number, spans) for spans in batches(made.spans))

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
                "spans do not reach %s (%s). They stay in the session and are sent when it takes them. Check that it"
                " runs, and that OTEL_EXPORTER_OTLP_PROTOCOL (grpc or http/protobuf) is the one of its port",
                self.state.target,
                self.state.trouble,
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
) -> int:
    """The export process of a collector: follows until told. Its exit status: 0, or 2 where it makes no sense again.

    `metrics` is where the counts of what was lost and sent go.

    Raises what the OpenTelemetry SDK raises for variables that it cannot use (BadSettings).
    """
    sink = OtlpSink.to(destination, session.identity.key)
    try:
        counts = None if metrics is None else MetricsSink(metrics, REQUEST_S)
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
