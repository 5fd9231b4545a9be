"""When work ran on a device, on the host's clock, with a bound of the error. Pure: numbers in, numbers out.

A device's timer and the host's clock begin anywhere and do not run alike. What is known of a moment that the device's
timer has is what the host did around it: the moment lies after the host had launched what notes it, and before the
host saw it noted. Every such observation bounds the offset between the clocks on both sides; the narrowest bounds
count, each widened by what the clocks may have drifted apart since.
"""

from __future__ import annotations

DRIFT_PPM = 100
"""What the two clocks are taken to drift apart at most: crystals on both sides, and NTP that slews the host's clock. An
assumption, not a measurement; observations that contradict it are counted."""
RESOLUTION_NS = 1000
"""Of a time between two events: CUDA promises about half a microsecond; both ends."""


class DeviceClock:
    """The offset between a device's timer and the host's monotonic clock, from observations. All times in ns."""

    def __init__(self, drift_ppm: int = DRIFT_PPM, resolution_ns: int = RESOLUTION_NS):
        self._ppm = drift_ppm
        self._resolution = resolution_ns
        self._known = False
        self._at = 0  # the device's time that the bounds are of
        self._lower = self._upper = 0  # of host time less device time
        self.contradictions = 0  # observations that no drift within the bound explains; each begins anew

    def observe(self, device_ns: int, launched_ns: int, seen_ns: int) -> None:
        """A moment of the device's timer lies between two of the host's."""
        lower = launched_ns - device_ns - self._resolution
        upper = seen_ns - device_ns + self._resolution
        if not self._known:
            self._known, self._at, self._lower, self._upper = True, device_ns, lower, upper
            return
        grown = self._grown(device_ns)
        if device_ns >= self._at:
            self._at, self._lower, self._upper = device_ns, self._lower - grown, self._upper + grown
        else:
            lower, upper = lower - grown, upper + grown
        if lower > self._upper or upper < self._lower:
            self.contradictions += 1
            self._lower, self._upper = lower, upper
        else:
            self._lower, self._upper = max(lower, self._lower), min(upper, self._upper)

    def host_ns(self, device_ns: int) -> int:
        """The host's time at a moment of the device's timer: the middle of what it can be."""
        return device_ns + (self._lower + self._upper) // 2

    def error_ns(self, device_ns: int) -> int:
        """By how much `host_ns` of that moment can be off at most, if the clocks drift no faster than is assumed."""
        return -(-(self._upper - self._lower) // 2) + self._grown(device_ns)

    def _grown(self, device_ns: int) -> int:
        """What a bound has grown by at that moment; rounded up."""
        return -(-abs(device_ns - self._at) * self._ppm // 1_000_000)
