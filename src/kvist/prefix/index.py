"""The router's own index: one radix tree for all workers, fed by the router's own decisions.

Each node carries the set of workers that hold it, as a bit mask over worker slots. What a worker holds is
prefix-closed, so the mask of a child is a subset of its parent's and one walk down the prompt answers for all
workers: whoever drops out at a node holds the prompt up to there. Cost follows the nodes on the path, not the
prompt's blocks.

Memory is bounded: each worker has a budget (its cache capacity where known) and its least recently used
leaves go first, as an engine's would; an edge that nobody holds is freed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from kvist.model import TOKEN_BYTES, Query
from kvist.prefix.tree import Node, RadixTree, Walk

CORRECTION_SLACK = 128  # tokens; vLLM's largest usual block
DEFAULT_BUDGET = 4_000_000  # tokens a worker, where its capacity is unknown


def bits(mask: int) -> Iterator[int]:
    """Positions of the set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class PrefixIndex:
    """See `kvist.prefix.base.PrefixKnowledge`.

    unit: bytes a token of the prompts (1: UTF-8 text). block_size: tokens; matches are whole blocks.
    units_per_token: prompt units that make one token of a worker's capacity (about 4 for text).
    budget: tokens to remember for a worker of unknown capacity.
    """

    def __init__(
        self,
        *,
        unit: int = TOKEN_BYTES,
        block_size: int = 1,
        units_per_token: int = 1,
        budget: int = DEFAULT_BUDGET,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, not {block_size}")
        if budget < block_size:
            raise ValueError(f"budget must be at least one block of {block_size} tokens, not {budget}")
        self.block_size = block_size
        self.budget = budget
        self.units_per_token = units_per_token
        self.tree = RadixTree(unit * block_size, self)
        # Per worker, least recently used first, leaves before parents. A plain dict would walk over all that
        # was deleted at its front to find the next.
        self._lru: dict[int, OrderedDict[Node, None]] = {}
        self._walked: tuple[Query, Walk] | None = None  # the last match, for the `routed` that follows it
        self._held: dict[int, int] = {}  # blocks
        self._limit: dict[int, int] = {}

    def add_worker(self, slot: int, capacity: int) -> None:
        if slot in self._lru:
            self.remove_worker(slot)
        self._lru[slot] = OrderedDict()
        self._held[slot] = 0
        self.set_capacity(slot, capacity)

    def set_capacity(self, slot: int, capacity: int) -> None:
        """A smaller budget takes effect with the next prompt that is routed there."""
        self._limit[slot] = max((capacity or self.budget) * self.units_per_token // self.block_size, 1)

    def forget(self, slot: int) -> None:
        """The worker holds nothing any more (it restarted)."""
        while self._lru[slot]:
            self._forget(next(iter(self._lru[slot])), slot)

    def remove_worker(self, slot: int) -> None:
        self.forget(slot)
        del self._lru[slot], self._held[slot], self._limit[slot]

    def cached_tokens(self, slot: int) -> int:
        return self._held[slot] * self.block_size

    def match(self, query: Query, slots: int, now: float = 0.0) -> list[int]:
        cached = [0] * slots
        walk = self.tree.walk(query.prompt, query.salt)
        self._walked = (query, walk)
        partial = walk.partial if walk.part else None
        path = walk.path if partial is None else [*walk.path, partial]
        if not path:
            return cached
        holders: int = path[0].state
        depth = 0
        for node in path:
            gone = holders & ~node.state
            while gone:  # as `bits`, inlined: this runs for every request
                low = gone & -gone
                cached[low.bit_length() - 1] = depth
                gone ^= low
                holders ^= low
            depth += (walk.part if node is partial else node.size) * self.block_size
        while holders:
            low = holders & -holders
            cached[low.bit_length() - 1] = depth
            holders ^= low
        return cached

    def routed(self, query: Query, slot: int, now: float = 0.0) -> None:
        """Hold the prompt's whole blocks for the worker and make them its most recently used."""
        tree, prompt = self.tree, query.prompt
        lru, bit = self._lru[slot], 1 << slot
        if self._walked is not None and self._walked[0] is query:
            walk = self._walked[1]
        else:
            walk = tree.walk(prompt, query.salt)
        self._walked = None
        path, offset = walk.path, walk.offset
        if walk.part:
            assert walk.partial is not None
            path.append(tree.split(walk.partial, walk.part))
            offset += walk.part * tree.stride
        end = len(prompt) - len(prompt) % tree.stride
        if offset < end:
            leaf = tree.append(path[-1] if path else tree.root, prompt, offset, end, query.salt)
            leaf.state = 0
            path.append(leaf)
        for node in reversed(path):  # leaf first: the front of the order is always a leaf of this worker
            if node.state & bit:
                lru.move_to_end(node)
            else:
                node.state |= bit
                self._held[slot] += node.size
                lru[node] = None
        while self._held[slot] > self._limit[slot] and lru:
            self._forget(next(iter(lru)), slot)

    def answered(
        self, query: Query, slot: int, expected: int, cached: int | None, output: int = 0, now: float = 0.0
    ) -> None:
        """Use the truth: what was expected and the engine no longer had, its extensions are gone too.

        The prompt itself was just cached again, so only what branches off it is forgotten, between `cached`
        and `expected`. An engine counts whole blocks and computes the last one in any case, so a shortfall
        of up to CORRECTION_SLACK tokens says nothing.
        """
        if cached is None or slot not in self._lru:
            return
        cached += CORRECTION_SLACK * self.units_per_token
        if cached >= expected:
            return
        bit = 1 << slot
        walk = self.tree.walk(query.prompt, query.salt)
        depth = 0
        for i, node in enumerate(walk.path):
            depth += node.size * self.block_size
            if depth > expected:
                return
            if depth <= cached or not node.state & bit:
                continue
            after = walk.path[i + 1] if i + 1 < len(walk.path) else None
            for child in list(node.children.values()):
                if child is not after and child.state & bit:
                    self._forget_below(child, slot)

    def dropped(self, query: Query, slot: int, now: float = 0.0) -> None:
        """It may be cached all the same; the next answer tells."""

    def _forget_below(self, node: Node, slot: int) -> None:
        bit = 1 << slot
        stack, order = [node], []
        while stack:
            at = stack.pop()
            order.append(at)
            stack.extend(child for child in at.children.values() if child.state & bit)
        for at in reversed(order):
            self._forget(at, slot)

    def _forget(self, node: Node, slot: int) -> None:
        """The worker no longer holds `node`, which is a leaf among what it holds."""
        self._walked = None
        del self._lru[slot][node]
        self._held[slot] -= node.size
        node.state &= ~(1 << slot)
        if not node.state:  # nobody holds it, so nobody holds what is below: it is a leaf
            self.tree.total -= node.size
            self.tree.unlink(node)

    def snapshot(self, names: Mapping[int, str]) -> dict[str, object]:
        """What the workers in `names` (slot -> name) hold, in their order of use, as plain data."""
        numbers: dict[Node, int] = {}
        nodes: list[tuple[int, bytes, bytes]] = []  # parent, salt, blocks; parents first
        stack = list(self.tree.root.children.values())
        while stack:
            node = stack.pop()
            at_root = node.parent is self.tree.root
            above = -1 if at_root or node.parent is None else numbers[node.parent]
            salt = node.first[: -self.tree.stride] if at_root else b""
            numbers[node] = len(nodes)
            nodes.append((above, salt, node.key[: node.size * self.tree.stride]))
            stack.extend(node.children.values())
        held = {name: [numbers[node] for node in self._lru[slot]] for slot, name in names.items()}
        return {"stride": self.tree.stride, "nodes": nodes, "held": held}

    def restore(self, state: dict[str, Any], slots: Mapping[str, int]) -> None:
        """Take back a snapshot, into an empty index, of those workers (name -> slot) that are here again.

        Raises ValueError if it does not fit.
        """
        stride = self.tree.stride
        if state["stride"] != stride or self.tree.total:
            raise ValueError(f"made for blocks of {state['stride']} bytes, not {stride}")
        orders = {slots[name]: order for name, order in state["held"].items() if name in slots}
        masks = [0] * len(state["nodes"])
        for slot, order in orders.items():
            for number in order:
                masks[number] |= 1 << slot
        made: list[Node] = []
        for (above, salt, key), mask in zip(state["nodes"], masks, strict=True):
            parent = self.tree.root if above < 0 else made[above]
            if not mask:
                made.append(self.tree.root)  # nobody who is here holds it, nor what is below
                continue
            if not key or len(key) % stride or (above >= 0 and mask & ~parent.state):
                raise ValueError("the nodes do not fit together")
            node = self.tree.append(parent, key, 0, len(key), salt)
            node.state = mask
            made.append(node)
        for slot, order in orders.items():
            for number in order:
                self._lru[slot][made[number]] = None
                self._held[slot] += made[number].size

    # The tree's observer.
    def split(self, upper: Node, lower: Node) -> None:
        upper.state = lower.state
        self._walked = None
        for slot in bits(lower.state):
            lru = self._lru[slot]
            lru[upper] = None  # behind its child, so leaves still go first; and its ancestors behind it
            above = upper.parent
            while above is not None and above.parent is not None:
                lru.move_to_end(above)
                above = above.parent

    def candidate(self, node: Node) -> None:
        pass

    def retract(self, node: Node) -> None:
        pass

    def remove(self, node: Node) -> None:
        pass

    def settle(self, node: Node) -> None:
        pass
