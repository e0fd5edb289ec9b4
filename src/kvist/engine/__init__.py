"""The engine model: a worker as a step function over a latency profile."""

from kvist.engine.core import Engine
from kvist.engine.latency import LatencyProfile, load_profile, profile_names
from kvist.engine.order import ORDERS, QueueOrder, make_order
from kvist.engine.request import EngineStats, Refused, Request, State, StepResult

__all__ = [
    "ORDERS",
    "Engine",
    "EngineStats",
    "LatencyProfile",
    "QueueOrder",
    "Refused",
    "Request",
    "State",
    "StepResult",
    "load_profile",
    "make_order",
    "profile_names",
]
