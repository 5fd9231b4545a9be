"""A session's identity: session.json, created once by whoever comes first, engine or collector."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes, token_hex

from .sharing import share

FILE = "session.json"
_PATIENCE_S = 2.0
_HEX = frozenset("0123456789abcdef")
_LONGEST_ID = 32  # what a ring's header has room for


@dataclass(frozen=True)
class Identity:
    """Who the session is: a random id and the key of its hashes."""

    session: str
    key: bytes


def read_identity(path: Path) -> Identity | None:
    """The identity of the session at `path`, or None when it has none (yet) that is readable."""
    try:
        data = json.loads((path / FILE).read_text("utf-8"))
        session, key = str(data["id"]), bytes.fromhex(data["key"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # The id becomes the name of a directory of rings, and the key one of BLAKE2's.
    good = 0 < len(session) <= _LONGEST_ID and _HEX.issuperset(session) and 0 < len(key) <= blake2b.MAX_KEY_SIZE
    return Identity(session, key) if good else None


def claim_identity(path: Path) -> Identity:
    """The identity of the session at `path`, made here if nobody was first.

    Raises OSError when the directory cannot be made or written, or when a first comer left an unreadable file;
    PermissionError says what to do when it belongs to another user.
    """
    try:
        return _claim(path)
    except PermissionError as error:
        raise PermissionError(
            f"{error}: the session belongs to another user. Run engine and collector as one user, or set"
            " STAGETRACE_GROUP to a group of both for both"
        ) from error


def _claim(path: Path) -> Identity:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    share(path)
    try:
        descriptor = os.open(path / FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        deadline = time.monotonic() + _PATIENCE_S
        while (identity := read_identity(path)) is None:
            if time.monotonic() > deadline:
                (path / FILE).read_bytes()  # says so itself if that is forbidden
                raise OSError(f"{path / FILE} is not readable: remove the directory or name another") from None
            time.sleep(0.005)
        return identity
    identity = Identity(token_hex(16), token_bytes(16))
    text = json.dumps({"id": identity.session, "key": identity.key.hex(), "created_ns": time.time_ns(), "version": 1})
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
    share(path / FILE)
    return identity
