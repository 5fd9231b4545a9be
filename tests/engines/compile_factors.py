"""Run by the engine's Python: prints as JSON the variables that are in vLLM's compile key, with its plugins loaded."""

import json
import os

import vllm.envs
from vllm.plugins import load_general_plugins

load_general_plugins()
print(json.dumps({"factors": vllm.envs.compile_factors(), "session": os.environ.get("STAGETRACE_SESSION")}))
