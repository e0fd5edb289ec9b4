"""The life of a request between a policy and replicas that may refuse it. Pure: no Ray, no clock.

Ray Serve asks for replicas in order of preference, tries them, and may come back: a replica's queue was full,
the replica died, the caller left. So a request holds a claim from the first choice to its end:

    rank -> (rank again) -> placed -> ended
                       \\-> ended, whenever the request goes away

At most one ticket of the core's router is open for a claim, on the replica that it is meant for or runs on.
It is taken when the choice is made, not when the replica accepts: requests chosen in between see it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

from kvist.model import Query
from kvist.routing import NoWorker, Outcome, Router, Status, Ticket

SPARE = 8  # replicas named behind the first two; Serve asks again if all of them refuse


class Claim:
    """One request, from its first choice of a replica to its end."""

    __slots__ = ("ended", "query", "ticket")

    def __init__(self, query: Query) -> None:
        self.query = query
        self.ticket: Ticket | None = None
        self.ended = False


class Dispatcher:
    """Replicas are named by id. capacity: tokens of KV cache a replica, 0 if unknown."""

    def __init__(self, router: Router, *, capacity: int = 0) -> None:
        self.router = router
        self.capacity = capacity

    def update(self, replicas: Collection[str], now: float) -> None:
        """These replicas are there, and no others."""
        wanted = set(replicas)
        known = {worker.id for worker in self.router.workers}
        for replica in sorted(known - wanted):
            self.router.remove_worker(replica, now)
        for replica in replicas:
            if replica not in known:
                known.add(replica)
                self.router.add_worker(replica, now, capacity=self.capacity)

    def lost(self, replica: str, now: float) -> None:
        """A replica died; unknown ones are ignored. Its requests are ended by whoever runs them."""
        if any(worker.id == replica for worker in self.router.workers):
            self.router.remove_worker(replica, now)

    def rank(self, claim: Claim, free: Collection[str], full: Sequence[str], now: float) -> list[list[str]]:
        """Replicas in order of preference, as ranks: a later rank is tried if all of an earlier one refuse.

        free: those that may have room. With none, the claim holds nothing, and the `full` ones with the
        fewest in flight are named: whichever has room first takes the request.
        """
        self._release(claim, now)
        if claim.ended:
            return []
        try:
            claim.ticket = self.router.route(claim.query, now, free)
        except NoWorker:
            order = self._by_load(full)
            return [order[: SPARE + 2]] if order else []
        decision = claim.ticket.decision
        weighed = claim.ticket.candidates
        if len(decision.scores) == len(weighed):
            pairs = sorted(zip(decision.scores, range(len(weighed)), strict=True))
            order = [weighed[i].worker.id for _, i in pairs]
        else:  # the policy weighed none or only some of them
            order = self._by_load([candidate.worker.id for candidate in weighed])
        others = [replica for replica in order if replica != decision.worker]
        return [rank for rank in ([decision.worker], others[:1], others[1 : SPARE + 1]) if rank]

    def placed(self, claim: Claim, replica: str, now: float) -> None:
        """The request goes to this replica, the preferred one or another."""
        if claim.ended or (claim.ticket is not None and claim.ticket.decision.worker == replica):
            return
        self._release(claim, now)
        try:
            claim.ticket = self.router.route(claim.query, now, (replica,))
        except NoWorker:
            return  # it left in the meantime: the request will come back or fail

    def first_token(self, claim: Claim, now: float) -> None:
        if claim.ticket is not None:
            self.router.first_token(claim.ticket, now)

    def ended(self, claim: Claim, status: Status, now: float) -> Outcome | None:
        """The request is over: learn if it went well, give back what it held. Further calls do nothing."""
        if claim.ended:
            return None
        claim.ended = True
        if claim.ticket is None:
            return None
        outcome = Outcome(status)
        self.router.complete(claim.ticket, outcome, now)
        return outcome

    def _release(self, claim: Claim, now: float) -> None:
        if claim.ticket is not None:
            self.router.complete(claim.ticket, Outcome(Status.CANCELLED), now)
            claim.ticket = None

    def _by_load(self, replicas: Collection[str]) -> list[str]:
        """Known replicas, fewest in flight first."""
        known = [w for w in self.router.workers if w.id in replicas]
        return [w.id for w in sorted(known, key=lambda w: w.in_flight)]


class Unconfirmed:
    """Claims that were sent to a replica and not yet accepted, by replica and request id.

    Serve reports each end of a sending under that key, also of those whose replica refused or whose caller
    left before it answered. Calls made while one request is served share its id, so a key may name several
    sendings. An end belongs to an unconfirmed claim only if no other sending under the key is still to end.
    """

    def __init__(self) -> None:
        self._open: dict[Hashable, list[Claim]] = {}
        self._others: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._open) + len(self._others)

    def sent(self, key: Hashable, claim: Claim) -> None:
        self._open.setdefault(key, []).append(claim)

    def settled(self, key: Hashable, claim: Claim) -> None:
        """The replica accepted, or the claim goes elsewhere: this sending's end is not the claim's."""
        claims = self._open.get(key, [])
        if claim not in claims:
            return
        claims.remove(claim)
        if not claims:
            del self._open[key]
        self._others[key] = self._others.get(key, 0) + 1

    def completed(self, key: Hashable) -> Claim | None:
        """A sending ended; the claim that ended with it, if any."""
        others = self._others.get(key, 0)
        if others:
            if others == 1:
                del self._others[key]
            else:
                self._others[key] = others - 1
            return None
        claims = self._open.get(key)
        if claims is None:
            return None
        claim = claims.pop(0)
        if not claims:
            del self._open[key]
        return claim
