"""Settings of all tests: hypothesis judges results and not times, since machines are busy."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("stagetrace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stagetrace")
