"""How a report shows what devices did: tables for people, and an object of its JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .show import Grid, Part, duration_text, number_text, plain, share_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .breakdown import Distribution
    from .device import DeviceTime


def device_dict(device: DeviceTime, names: Mapping[int, str]) -> dict[str, Any]:
    """What a report's JSON has of a device; `names` of processes, by their key."""
    return {
        "process": names.get(device.process, ""),
        "observed_ns": device.observed_ns,
        "busy_ns": device.busy_ns,
        "still": [vars(each) for each in device.still],
        "pauses": distribution_dict(device.pauses),
        "launch_delay": distribution_dict(device.launch_delay),
        "clock_error": distribution_dict(device.clock_error),
        "clock_error_most_ns": device.clock_error_most_ns,
        "skipped": device.skipped,
        "contradictions": device.contradictions,
    }


def distribution_dict(values: Distribution) -> dict[str, int | None]:
    """Count, mean and percentiles under the names that they have in a report's JSON."""
    times = {"mean_ns": values.mean, "p50_ns": values.p50, "p95_ns": values.p95, "p99_ns": values.p99}
    return {"count": values.count} | {name: None if time is None else round(time) for name, time in times.items()}


def device_parts(devices: Sequence[DeviceTime], names: Mapping[int, str]) -> list[Part]:
    """Two tables: what each device did, and how far that is known; none where no device was timed."""
    if not devices:
        return []
    did = []
    known = []
    for device in devices:
        rank = plain(names.get(device.process, ""))
        share = device.busy_ns / device.observed_ns if device.observed_ns else None
        did.append([rank, "busy", duration_text(device.busy_ns), share_text(share)])
        did += [["", f"still: {x.reason}", duration_text(x.total_ns), share_text(x.share)] for x in device.still]
        times = [
            *(each for of in (device.launch_delay, device.pauses) for each in (of.p50, of.p95, of.p99)),
            *(device.clock_error.p50, device.clock_error_most_ns),
        ]
        counts = (device.skipped, device.contradictions)
        known.append([rank, *map(duration_text, times), *map(number_text, counts)])
    columns = ("launch delay p50", "p95", "p99", "still p50", "p95", "p99", "clock error p50", "most")
    return [
        Grid("Devices, from the first stage on each to the last", ("rank", "the device was", "total", "share"), did),
        Grid("Launching, and what is known of the clocks", ("rank", *columns, "left out", "contradictions"), known),
    ]
