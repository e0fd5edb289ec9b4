"""The simulator: a discrete-event cluster of engine models behind a router."""

from kvist.sim.base import SimConfig, SimResult, Summary, WorkerResult, WorkerSpec
from kvist.sim.cluster import SIMULATOR_ONLY, Cluster, simulate

__all__ = [
    "SIMULATOR_ONLY",
    "Cluster",
    "SimConfig",
    "SimResult",
    "Summary",
    "WorkerResult",
    "WorkerSpec",
    "simulate",
]
