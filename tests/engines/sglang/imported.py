"""Run by the engine's Python: what is loaded when a module of SGLang was imported after the plugins, as JSON."""

import importlib
import json
import sys


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    importlib.import_module(sys.argv[1])
    print(json.dumps(sorted(sys.modules)))


if __name__ == "__main__":
    main()
