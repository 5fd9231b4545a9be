"""Requests in SGLang's own form, whose response says what the server counted and timed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2 as httpx

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.server import Server


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    id: str
    text: str
    meta: dict[str, Any]
    tokens: list[int]  # that were generated


def generate(
    server: Server,
    rid: str,
    prompt: str | list[int],
    max_new_tokens: int,
    session_params: dict[str, Any] | None = None,
    **sampling: Any,
) -> Answer:
    """One request under an id of its own, greedy and to its full length unless `sampling` says otherwise.

    The prompt is a text, or its tokens; `session_params` make it a request of a session.
    """
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": max_new_tokens, **sampling}
    kind = "text" if isinstance(prompt, str) else "input_ids"
    body: dict[str, Any] = {"rid": rid, kind: prompt, "sampling_params": params}
    if session_params is not None:
        body["session_params"] = session_params
    response = httpx.post(f"{server.root_url}/generate", json=body, timeout=120)
    response.raise_for_status()
    answer = response.json()
    assert answer["meta_info"]["id"] == rid
    return Answer(rid, answer["text"], answer["meta_info"], answer["output_ids"])


def generate_together(server: Server, requests: Sequence[tuple[str, str, int]]) -> list[Answer]:
    """Several at once: id, text and tokens to generate of each."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: generate(server, *request), requests))
