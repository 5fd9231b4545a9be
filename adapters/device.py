"""What the device of a worker's process is called, so that its ceilings can be found; the same for both engines."""

from __future__ import annotations

import sys
from typing import Any


def device_info(kind: str) -> dict[str, object]:
    """For the record that a worker makes of itself; `kind` as the engine names it (cuda, rocm, cpu, ...).

    `device_name` as `stagetrace calibrate` has it too, `multiprocessors` where a device has such, `device_threads` of a
    processor. Whatever cannot be asked is left out.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {}
    try:
        if kind == "cpu":
            return {"device_name": processor_name(), "device_threads": int(torch.get_num_threads())}
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "device_name": str(torch.cuda.get_device_name()),
            "multiprocessors": int(properties.multi_processor_count),
        }
    except Exception:  # another kind of device, or one that does not answer: reports then say that it is not known
        return {}


def processor_name() -> str:
    """The processor's model, as Linux says it; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""
