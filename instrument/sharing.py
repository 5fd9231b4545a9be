"""Lets engine and collector run as different users: what they share belongs to a group when STAGETRACE_GROUP names one.

Without it everything is private to the user. With it directories are 02770 and files 0660 of that group, and a
file that another member of the group made is as good as one's own.
"""

from __future__ import annotations

import grp
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("stagetrace")

VARIABLE = "STAGETRACE_GROUP"
DIRECTORY, FILE = 0o2770, 0o660
_MOST = (1 << 32) - 1  # the kernel's number for no group


def group() -> int | None:
    """The group that STAGETRACE_GROUP names, by name or number; None without one, and (logged) for an unknown one."""
    name = os.environ.get(VARIABLE, "").strip()
    if not name:
        return None
    try:
        number = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):  # a number can have too many digits
        number = _MOST
    if number < _MOST:
        return number
    log.warning("there is no group %s: %s has no effect", name, VARIABLE)
    return None


def share(path: Path) -> None:
    """Gives a directory or file that this user made to the group, if there is one. Raises OSError."""
    to = group()
    if to is None or path.stat().st_uid != os.getuid():
        return
    os.chown(path, -1, to)
    path.chmod(DIRECTORY if path.is_dir() else FILE)


def trusted(path: Path) -> bool:
    """Whether only this user, or the group, may change what is in a directory. Raises OSError."""
    status = path.stat()
    if status.st_mode & 0o002:
        return False
    return status.st_uid == os.getuid() or status.st_gid == group()
