"""The simulator: a discrete-event cluster of engine models behind a router."""

from kvist.sim.base import SimConfig, SimResult, Summary, WorkerResult, WorkerSpec
from kvist.sim.cluster import Cluster, simulate

__all__ = ["Cluster", "SimConfig", "SimResult", "Summary", "WorkerResult", "WorkerSpec", "simulate"]
