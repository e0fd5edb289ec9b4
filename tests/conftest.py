"""Property tests judge by results alone: a slow machine is no failure.

They draw the same examples each time, so that a change and nothing else turns a test red.
KVIST_EXPLORE=1 draws new ones.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "kvist",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=not os.environ.get("KVIST_EXPLORE"),
)
settings.load_profile("kvist")
