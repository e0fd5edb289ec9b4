"""A Ray Serve request router whose choices are a kvist policy's.

Read from Ray 2.60, `ray/serve/_private/request_router/request_router.py` and `router.py`: Serve makes one
router a handle, calls `choose_replicas` for each waiting request until a replica takes it, resolves the
request's future with that replica, and calls `on_request_routed` once the replica accepted. How a request
ends shows in the result's done callback, which runs in a thread of Ray's: everything here is moved to the
router's event loop.

Every router learns alone; several ingress replicas are several routers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import weakref
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import grpc
from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import RequestCancelledError
from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from kvist.model import Query
from kvist.plugins.ray_serve.config import load_prompt
from kvist.plugins.ray_serve.dispatch import Claim, Dispatcher, Unconfirmed
from kvist.plugins.ray_serve.prompt import openai_request, query_of
from kvist.prefix.index import PrefixIndex
from kvist.routing import Router, Status, make_policy

logger = logging.getLogger("ray.serve")

BLOCK = 16  # bytes of text that match or miss together
BYTES_PER_TOKEN = 4


class KvistRequestRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """Arguments come through `RequestRouterConfig.request_router_kwargs`; see `router_config`."""

    def initialize_state(
        self,
        policy: str = "lbgr",
        policy_params: dict[str, Any] | None = None,
        prompt: str = "",
        kv_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        rule = make_policy(policy, rng=Random(seed), **(policy_params or {}))
        index = PrefixIndex(unit=1, block_size=BLOCK, units_per_token=BYTES_PER_TOKEN)
        self.dispatcher = Dispatcher(Router(rule, index=index), capacity=kv_tokens)
        self._prompt = load_prompt(prompt) if prompt else openai_request
        self._numbers = itertools.count()
        self._unconfirmed = Unconfirmed()
        self._routing: dict[asyncio.Task[Any], PendingRequest] = {}
        self._warned = False

    # Replicas
    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self.dispatcher.update([_name(r.replica_id) for r in replicas], time.monotonic())

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self.dispatcher.lost(_name(replica_id), time.monotonic())

    # Choosing
    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [list(candidate_replicas)]
        if pending_request.metadata.multiplexed_model_id:
            ids = self.apply_multiplex_routing(pending_request)
        else:
            ids = self.apply_locality_routing(pending_request)
        eligible = {_name(r.replica_id): r for r in candidate_replicas if r.replica_id in ids}
        free = {_name(r.replica_id) for r in self.select_available_replicas(list(eligible.values()))}
        claim = self._claim(pending_request)
        ranks = self.dispatcher.rank(claim, free, list(eligible), time.monotonic())
        return [[eligible[name] for name in rank] for rank in ranks]

    def _claim(self, pending: PendingRequest) -> Claim:
        """The request's claim; it follows the request's future, which every attempt has anew."""
        claim: Claim | None = getattr(pending, "kvist_claim", None)
        if claim is not None:
            self._unconfirmed.settled(getattr(pending, "kvist_key", None), claim)
        if claim is None or claim.ended:
            claim = Claim(claim.query if claim is not None else self._query(pending))
            pending.kvist_claim = claim
            # A choice that is never sent (Serve's `choose_replica`) ends nowhere else.
            gone = weakref.finalize(pending, self._later(self._ended), claim, _Gone())
            gone.atexit = False
            pending.kvist_finalizer = gone
        if getattr(pending, "kvist_future", None) is not pending.future:
            pending.kvist_future = pending.future
            pending.future.add_done_callback(partial(self._resolved, weakref.ref(pending), claim))
        task = asyncio.current_task()
        if task is not None and self._routing.get(task) is not pending:
            if task not in self._routing:
                task.add_done_callback(lambda ended: self._routing.pop(ended, None))
            self._routing[task] = pending
        return claim

    def _query(self, pending: PendingRequest) -> Query:
        number = next(self._numbers)
        model = pending.metadata.multiplexed_model_id
        try:
            query = query_of(number, self._prompt(pending.args, pending.kwargs), model)
            reason = "no prompt among the arguments"
        except Exception as error:  # a user's function, a user's request: routing must go on
            query, reason = None, f"{type(error).__name__}: {error}"
        if query is not None:
            return query
        if not self._warned:
            self._warned = True
            logger.warning(
                f"kvist routes {self._deployment_id.name}.{pending.metadata.call_method} by load alone "
                f"({reason}): name a function with `prompt` if the call carries one."
            )
        return Query(number, b"", unit=1, model=model)

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Give the replica to the request that it was chosen for.

        Serve matches by internal request id, which all calls share that are made while one request is
        served: with the first of them answered, the others would wait for ever.
        """
        task = asyncio.current_task()
        pending = self._routing.get(task) if task is not None else None
        if pending is None:
            super()._fulfill_next_pending_request(replica, request_metadata)
        elif not pending.future.done():
            self._record_queue_wait_time(pending)
            pending.future.set_result(replica)
            self._remove_pending_request_from_indices(pending)

    # From choice to end
    def _resolved(
        self,
        pending: weakref.ref[PendingRequest],
        claim: Claim,
        future: asyncio.Future[RunningReplica],
    ) -> None:
        """The request's caller left, or it got a replica and is sent there."""
        request = pending()
        if request is None or future.cancelled() or future.exception() is not None:
            self.dispatcher.ended(claim, Status.CANCELLED, time.monotonic())
            return
        replica = _name(future.result().replica_id)
        self.dispatcher.placed(claim, replica, time.monotonic())
        request.kvist_key = (replica, request.metadata.internal_request_id)
        self._unconfirmed.sent(request.kvist_key, claim)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """The replica accepted: from here on its result tells how the request ends."""
        claim: Claim | None = getattr(pending_request, "kvist_claim", None)
        if claim is None:
            return
        self._unconfirmed.settled(getattr(pending_request, "kvist_key", None), claim)
        self.dispatcher.placed(claim, _name(replica_id), time.monotonic())
        pending_request.kvist_finalizer.detach()
        self._watch(claim, result, pending_request.metadata.is_streaming)

    def _watch(self, claim: Claim, result: ReplicaResult, streaming: bool) -> None:
        """Hear of the request's first item and its end.

        Ray's actor transport reports an exception of the deployment's own code as an item, and the call
        itself as done: so the first item is looked at, lest a replica that fails at once seem a fast one.
        A stream that fails later counts as answered; gRPC's results carry exceptions unseen.
        """
        ended = self._later(self._ended)
        stream, first = getattr(result, "_obj_ref_gen", None), getattr(result, "_obj_ref", None)
        if streaming and stream is not None:
            (first,) = stream._get_next_ref_n(1)
        if first is None:
            result.add_done_callback(lambda how: ended(claim, how))
        elif streaming:
            seen = self._later(self._first_item)
            first._on_completed(lambda item: seen(claim, item))
            result.add_done_callback(lambda how: ended(claim, how))
        else:
            first._on_completed(lambda item: ended(claim, item))
            result.add_done_callback(lambda how: ended(claim, how) if _failed(how) else None)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A sending is over; what its replica accepted ends with its result, anything else here."""
        claim = self._unconfirmed.completed((_name(replica_id), internal_request_id))
        if claim is not None:
            self.dispatcher.ended(claim, Status.CANCELLED, time.monotonic())

    def _first_item(self, claim: Claim, item: Any) -> None:
        if _failed(item):
            self._ended(claim, item)
        else:
            self.dispatcher.first_token(claim, time.monotonic())

    def _ended(self, claim: Claim, how: Any) -> None:
        self.dispatcher.ended(claim, _status(how), time.monotonic())

    def _later(self, act: Callable[..., None]) -> Callable[..., None]:
        """`act` on the router's event loop, callable from any thread."""
        loop = asyncio.get_running_loop()

        def call(*args: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(act, *args)

        return call


class _Gone(asyncio.CancelledError):
    """How a request ends that was dropped before a replica accepted it."""


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)


def _failed(how: Any) -> bool:
    return isinstance(how, BaseException)


def _status(how: Any) -> Status:
    """What a callback was given: an exception, a gRPC call, or the result."""
    if isinstance(how, (TaskCancelledError, RequestCancelledError, asyncio.CancelledError)):
        return Status.CANCELLED
    if _failed(how):
        return Status.FAILED
    if isinstance(how, grpc.aio.Call):
        return Status.CANCELLED if how.cancelled() else Status.OK
    return Status.OK
