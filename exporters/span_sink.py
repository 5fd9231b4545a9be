"""Makes spans of a session's tables and hands them to a connection: what sinks of spans have in common.

When to send what, and again, is the follower's business (follow.py). A sink for a destination adds how its requests are
encoded: otlp.py, clickhouse.py.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from .gather import Gather
from .otlp_send import Answer
from .sampling import Sampler
from .session import names_of, not_visible_of
from .spans import LINK_LIMIT, Clock, Source, Spans, model_of, resource_attributes, rows_of, spans_of_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pyarrow as pa

    from .otlp_send import Sender
    from .sampling import Rules
    from .session import Manifest
    from .spans import Span

log = logging.getLogger(__name__)

# A request to the backend stays under gRPC's usual 4 MiB: a span takes about 1 KiB, a link about 60 bytes.
BATCH_SPANS = 512
BATCH_LINKS = 16384


class BadSettings(Exception):
    """What a destination was given cannot be followed; the message says what and why."""


class SpanSink(ABC):
    """Makes spans and sends them. `key` is the session's (Identity.key). Used by one thread."""

    usual: str  # what to look at when nothing arrives and it is not known why

    def __init__(self, connection: Sender, key: bytes, link_limit: int = LINK_LIMIT, rules: Rules | None = None):
        self._sender = connection
        self._key = key
        self._link_limit = link_limit
        self._gather = Gather()
        self.sampler = None if rules is None or rules.all else Sampler(rules, key)
        self._closed = False
        self._answer = Answer(True)
        self._resources: dict[tuple[tuple[str, str | int], ...], Mapping[str, Any]] = {}
        self._of: dict[int | None, Mapping[str, Any]] = {}  # resource attributes, by process

    @abstractmethod
    def encode(self, batch: Sequence[Span]) -> bytes:
        """The body of a request with these spans."""

    def spans(self, tables: Mapping[str, pa.Table], manifest: Manifest) -> Spans:
        """The spans of these tables (by name, as in session.TABLES), and what became none.

        A step comes with its segments in one call; the states and members of a request come with its row or earlier.
        Raises ValueError when the manifest has no clock anchor.
        """
        rows, left_out = self._gather.add(rows_of(tables))
        wanted: frozenset[tuple[int, int]] = frozenset()
        if self.sampler is not None:
            picked = self.sampler.pick(rows)
            rows, wanted = picked.rows, frozenset(picked.wanted)
            left_out += picked.left_out
        made = spans_of_rows(rows, self._source(manifest), self._link_limit)
        return Spans(made.spans, made.left_out + left_out, wanted)

    def steps(self, tables: Mapping[str, pa.Table], manifest: Manifest, wanted: set[tuple[int, int]]) -> Spans:
        """The spans of those steps in the tables of an earlier commit that a kept request took part in."""
        assert self.sampler is not None
        rows = self.sampler.of_steps(rows_of(tables), wanted)
        made = spans_of_rows(rows, self._source(manifest), self._link_limit)
        back = Counter(steps_sampled_out=-len(rows["steps"]), segments_sampled_out=-len(rows["segments"]))
        back.update(made.left_out)
        return Spans(made.spans, back)

    def remember(self, tables: Mapping[str, pa.Table], decide: bool = False) -> None:
        """Takes in tables whose spans the backend has: states of requests that are not over are still to come.

        With `decide` they are of one commit, and what was sampled then is known again.
        """
        rows, _ = self._gather.add(rows_of(tables))
        if self.sampler is None:
            return
        if decide:
            self.sampler.pick({**rows, "steps": [], "segments": []})
        else:
            self.sampler.learn(rows["requests"])

    def send(self, batch: Sequence[Span]) -> bool:
        """Sends one request with these spans (see `batches`). Whether the backend confirmed it; never raises."""
        if self._closed:
            return False
        try:
            self._answer = self._sender.send(self.encode(batch))
        except Exception as error:
            log.exception("the export of %d spans failed", len(batch))
            self._answer = Answer(False, f"{type(error).__name__}: {error}")
        return self._answer.confirmed

    def shutdown(self) -> None:
        """Closes the connection; nothing is sent afterwards. Can be called again."""
        if not self._closed:
            self._closed = True
            self._sender.close()

    @property
    def why(self) -> str:
        """Why the last request was not confirmed; empty when it was."""
        return self._answer.why

    @property
    def hopeless(self) -> bool:
        """Whether the last request will not be taken until somebody changes a setting."""
        return self._answer.hopeless

    @property
    def remedy(self) -> str:
        """What is the matter with the last request, and what to change; empty where that is not known."""
        return self._answer.remedy

    def _source(self, manifest: Manifest) -> Source:
        self._of[None] = self._resource(resource_attributes(manifest))
        for process in manifest.processes:
            self._of[process.key] = self._resource(resource_attributes(manifest, process))
        return Source(
            self._key,
            Clock(manifest.anchors),
            {process.key for process in manifest.processes},
            model_of(manifest),
            names_of(manifest.processes),
            {process.key: not_visible_of(process) for process in manifest.processes},
        )

    def _resource(self, attributes: dict[str, str | int]) -> Mapping[str, Any]:
        """The resource with these attributes; OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME go before them."""
        which = tuple(attributes.items())
        if which not in self._resources:
            whole = Resource.create({**attributes, **OTELResourceDetector().detect().attributes})
            self._resources[which] = whole.attributes
        return self._resources[which]


def batches(spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
    """The spans in their order, in lists of at most BATCH_SPANS, and BATCH_LINKS where more than one span is in it."""
    begin = links = 0
    for at, span in enumerate(spans):
        own = len(span.links)
        if at > begin and (at - begin == BATCH_SPANS or links + own > BATCH_LINKS):
            yield spans[begin:at]
            begin, links = at, 0
        links += own
    if begin < len(spans):
        yield spans[begin:]
