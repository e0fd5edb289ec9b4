"""vLLM's BlockPool and FullAttentionManager with the order of eviction left to a policy of the core.

The free queue stays vLLM's own and holds every free block: blocks without a hash in front (`_blank` of them),
cached ones behind. Before vLLM pops blocks, the policy's victims move to the front, and vLLM's own code takes
them from there: hash map, KV events, metrics and reference counts are its business as before.

Read against vllm/v1/core/block_pool.py and single_type_kv_cache_manager.py of the versions in install.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from kvist.cache import EvictionPolicy
from kvist.plugins.vllm.report import Report
from kvist.plugins.vllm.tree import BlockNode, BlockTree


class PolicyBlockPool(BlockPool):  # type: ignore[misc]
    """A pool that was made by vLLM and then `adopt`ed before its first block was used."""

    cached: BlockTree
    report: Report
    _nodes: list[BlockNode | None]  # by block id: what a cached block holds
    _blank: int

    def adopt(self, policy: EvictionPolicy, say: Callable[[str], None]) -> None:
        self.cached = BlockTree(max(self.num_gpu_blocks - 1, 1), policy, self.hash_block_size)
        self.report = Report(self.cached, say)
        self._nodes = [None] * self.num_gpu_blocks
        self._blank = self.free_block_queue.num_free_blocks

    def serve(self, computed: Sequence[Any]) -> None:
        """A request starts, with these cached blocks as its prefix."""
        tree, nodes = self.cached, self._nodes
        tree.begin()
        hit, now = tree.eviction.hit, tree.now
        for block in computed:
            node = nodes[block.block_id]
            if node is not None:
                hit(node, now)

    def touch(self, blocks: Sequence[Any]) -> None:
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                node = self._nodes[block.block_id]
                if node is None:
                    self._blank -= 1
                else:
                    self.cached.use(node)
        super().touch(blocks)

    def get_new_blocks(self, num_blocks: int) -> list[Any]:
        lacking = num_blocks - self._blank
        if lacking > 0 and num_blocks <= self.free_block_queue.num_free_blocks:
            victims = self.cached.victims(lacking)
            for block in victims:
                self._nodes[block.block_id] = None
                self.free_block_queue.remove(block)
            self.free_block_queue.prepend_n(victims)
            self.report.evicted()
            # Fewer victims than lacking: a connector holds a block whose prefix is free. Then vLLM takes what
            # has been free longest, and `_maybe_evict_cached_block` tells the tree.
            self._blank += len(victims)
        got: list[Any] = super().get_new_blocks(num_blocks)
        self._blank = max(self._blank - num_blocks, 0)
        return got

    def cache_full_blocks(
        self,
        request: Any,
        blocks: list[Any],
        num_cached_blocks: int,
        num_full_blocks: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().cache_full_blocks(request, blocks, num_cached_blocks, num_full_blocks, *args, **kwargs)
        tree, nodes = self.cached, self._nodes
        tree.now += 1
        parent = nodes[blocks[num_cached_blocks - 1].block_id] if num_cached_blocks else None
        for block in blocks[num_cached_blocks:num_full_blocks]:
            name = block.block_hash
            if name is None:
                parent = None
                continue
            node = tree.child(parent, name)
            if node is None:
                node = tree.grow(parent, name)
            else:
                spare = node.block
                tree.use(node)
                tree.eviction.touch(node, tree.now)
                if spare is not None:
                    self._blank_out(spare)
            nodes[block.block_id] = parent = node

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        blocks = list(ordered_blocks)
        super().free_blocks(blocks)
        tree, nodes = self.cached, self._nodes
        tree.now += 1
        touch, now, rest = tree.eviction.touch, tree.now, tree.rest
        for block in blocks:
            node = nodes[block.block_id]
            if node is None:
                self._blank += block.ref_cnt == 0 and not block.is_null
                continue
            touch(node, now)
            if block.ref_cnt == 0 and not rest(node, block):
                self._blank_out(block)

    def evict_blocks(self, block_ids: set[int]) -> None:
        free = [i for i in block_ids if self._nodes[i] is not None and self.blocks[i].ref_cnt == 0]
        super().evict_blocks(block_ids)
        for block_id in free:
            self._to_front(self.blocks[block_id])

    def reset_prefix_cache(self) -> bool:
        if not super().reset_prefix_cache():
            return False
        self.cached.reset()
        self._nodes = [None] * self.num_gpu_blocks
        self._blank = self.free_block_queue.num_free_blocks
        return True

    def _maybe_evict_cached_block(self, block: Any) -> bool:
        node = self._nodes[block.block_id]
        if node is not None:
            self._nodes[block.block_id] = None
            self.cached.lose(node, block)
        return bool(super()._maybe_evict_cached_block(block))

    def _emit_block_removed_events(self, block_hashes: list[Any]) -> None:
        """Only when the last copy goes: listeners keep a set of hashes."""
        if not self.enable_kv_cache_events:
            return
        held = self.cached_block_hash_to_block
        super()._emit_block_removed_events([h for h in block_hashes if held.get_one_block(h) is None])

    def _blank_out(self, block: Any) -> None:
        """Forget what a free block holds: another copy is in use."""
        self._nodes[block.block_id] = None
        self._maybe_evict_cached_block(block)
        self._to_front(block)

    def _to_front(self, block: Any) -> None:
        """A free block lost its hash: it is the first to be used again."""
        self.free_block_queue.remove(block)
        self.free_block_queue.prepend_n([block])
        self._blank += 1


class PolicyManager(FullAttentionManager):  # type: ignore[misc]
    """Tells the pool when a request starts, and with which hits."""

    block_pool: PolicyBlockPool

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> None:
        self.block_pool.serve(new_computed_blocks)
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, *args: Any) -> Any:
        if request_id not in self.req_to_blocks:
            self.block_pool.serve(())  # a request without hits
        return super().allocate_new_blocks(request_id, *args)
