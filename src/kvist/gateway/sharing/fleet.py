"""A router whose figures include what its peers have under way.

The peers' part is added to each worker's own counters, so every policy counts it without knowing of it; the
router's additions and subtractions go on beside it. What is published is the difference: one's own part.
"""

from __future__ import annotations

from kvist.gateway.sharing.share import NOTHING, Peers, Share, WorkerShare
from kvist.model import WorkerState
from kvist.routing import Router


class SharedFleet:
    """gateway: a name of its own. epoch: larger after each start, as the time in nanoseconds."""

    def __init__(self, router: Router, gateway: str, epoch: int, fresh_for: float) -> None:
        self.router = router
        self.gateway = gateway
        self.epoch = epoch
        self.peers = Peers(gateway, fresh_for)
        self._sequence = 0
        self._added: dict[str, tuple[WorkerState, WorkerShare]] = {}

    def own(self) -> Share:
        """This gateway's share as of now; each call gives a newer one."""
        self._sequence += 1
        workers = {}
        for state in self.router.workers:
            part = _figures(state) - self._part(state)
            if part.in_flight or part.load > 0:
                workers[state.id] = WorkerShare(
                    max(part.in_flight, 0),
                    max(part.in_flight_tokens, 0),
                    max(part.waiting, 0),
                    max(part.pending_prefill, 0),
                    max(part.load, 0.0),
                )
        return Share(self.gateway, self.epoch, self._sequence, self.router.policy.name, workers)

    def refresh(self, now: float) -> int:
        """Let the workers' counters hold the fresh peers' part; how many peers that are."""
        total = self.peers.total(self.router.policy.name, now)
        added = {}
        for state in self.router.workers:
            part = total.get(state.id, NOTHING)
            _add(state, part - self._part(state))
            state.load_elsewhere = part.load
            added[state.id] = state, part
        self._added = added
        return len(self.peers.fresh(now))

    def _part(self, state: WorkerState) -> WorkerShare:
        """What the counters of this very state hold of the peers: a worker that came back starts anew."""
        known = self._added.get(state.id)
        return known[1] if known is not None and known[0] is state else NOTHING


def _figures(state: WorkerState) -> WorkerShare:
    load = state.load + state.load_elsewhere
    return WorkerShare(state.in_flight, state.in_flight_tokens, state.waiting, state.pending_prefill, load)


def _add(state: WorkerState, part: WorkerShare) -> None:
    state.in_flight += part.in_flight
    state.in_flight_tokens += part.in_flight_tokens
    state.waiting += part.waiting
    state.pending_prefill += part.pending_prefill
