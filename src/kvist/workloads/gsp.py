"""GSP, generated shared prefix: groups of prompts with one system prompt a group (paper section 4)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from random import Random

from kvist.model import Query
from kvist.workloads.base import UNIQUE, Filler, Workload, poisson

ORDERS = ("random", "grouped", "round_robin")


class GSP(Workload):
    name = "gsp"
    description = "Groups of prompts that share a system prompt, Poisson arrivals."
    source = "paper section 4; SGLang bench_serving generated-shared-prefix"
    params = {
        "groups": "number of groups (128)",
        "prompts": "prompts a group (32)",
        "lengths": "prompt lengths in tokens, cycling over the groups (512/1024/2048/4096/8192)",
        "shared": "share of a prompt that its group has in common (0.5)",
        "output": "output tokens (4)",
        "order": "random, grouped (best for caches) or round_robin (worst)",
    }

    def __init__(
        self,
        *,
        groups: int = 128,
        prompts: int = 32,
        lengths: str = "512/1024/2048/4096/8192",
        shared: float = 0.5,
        output: int = 4,
        order: str = "random",
        rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rate=12.0 if rate is None else rate, seed=seed)
        if groups < 1 or prompts < 1 or output < 1:
            raise ValueError("gsp: groups, prompts and output must be at least 1")
        if not 0 <= shared <= 1:
            raise ValueError(f"gsp: shared must lie between 0 and 1, not {shared}")
        if order not in ORDERS:
            raise ValueError(f"gsp: order must be one of {', '.join(ORDERS)}, not {order!r}")
        try:
            self.lengths = [int(part) for part in str(lengths).split("/")]
        except ValueError:
            raise ValueError(f"gsp: lengths must be integers joined by /, not {lengths!r}") from None
        if min(self.lengths) < 1:
            raise ValueError("gsp: lengths must be at least 1 token")
        self.groups, self.prompts, self.shared, self.output, self.order = (
            groups,
            prompts,
            shared,
            output,
            order,
        )

    @property
    def total(self) -> int:
        return self.groups * self.prompts

    def describe(self) -> str:
        return (
            f"GSP, generated: {self.groups} groups x {self.prompts} prompts of "
            f"{min(self.lengths)} to {max(self.lengths)} tokens, {self.shared:.0%} shared, order {self.order}"
        )

    def __iter__(self) -> Iterator[Query]:
        rng = Random(f"{self.seed}/gsp")
        filler = Filler(self.seed)
        shared = []
        for group in range(self.groups):
            length = self.lengths[group % len(self.lengths)]
            shared.append(filler.piece(group, round(length * self.shared)))
        assert self.rate is not None
        for number, (group, arrival) in enumerate(
            zip(self._ordered(rng), poisson(self.rate, rng), strict=False)
        ):
            length = self.lengths[group % len(self.lengths)]
            own = filler.piece(UNIQUE + number, length - len(shared[group]) // 4)
            yield Query(number, shared[group] + own, self.output, arrival, session=f"group{group}")

    def _ordered(self, rng: Random) -> Iterator[int]:
        """The prompts' groups; a random order costs four bytes a prompt, the others nothing."""
        if self.order == "round_robin":
            return (group for _ in range(self.prompts) for group in range(self.groups))
        if self.order == "grouped":
            return (group for group in range(self.groups) for _ in range(self.prompts))
        places = array("I", range(self.total))
        rng.shuffle(places)
        return (place // self.prompts for place in places)
