"""LBGR, learning-based greedy routing: the policy, what it knows of a worker, its queue, its price."""

from kvist.routing.lbgr.policy import LBGR

__all__ = ["LBGR"]
