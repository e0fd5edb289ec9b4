"""Property tests judge by results alone: a slow machine is no failure."""

from hypothesis import HealthCheck, settings

settings.register_profile("kvist", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvist")
