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
from kvist.plugins.vllm.tree import BlockTree, Cached


class PolicyBlockPool(BlockPool):  # type: ignore[misc]
    """A pool that was made by vLLM and then `adopt`ed before its first block was used."""

    cached: BlockTree
    report: Report
    _held: list[Cached | None]  # by block id: what a cached block holds
    _blank: int

    def adopt(self, policy: EvictionPolicy, say: Callable[[str], None]) -> None:
        self.cached = BlockTree(max(self.num_gpu_blocks - 1, 1), self.hash_block_size, policy)
        self.report = Report(self.cached, say)
        self._held = [None] * self.num_gpu_blocks
        self._blank = self.free_block_queue.num_free_blocks

    def serve(self, computed: Sequence[Any]) -> None:
        """A request starts, with these cached blocks as its prefix."""
        self.cached.start(self.cached.path(block.block_hash for block in computed))

    def touch(self, blocks: Sequence[Any]) -> None:
        taken = []
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                cached = self._held[block.block_id]
                if cached is None:
                    self._blank -= 1
                else:
                    taken.append(cached)
        super().touch(blocks)
        self.cached.use(taken)

    def get_new_blocks(self, num_blocks: int) -> list[Any]:
        lacking = num_blocks - self._blank
        if lacking > 0 and num_blocks <= self.free_block_queue.num_free_blocks:
            victims = self.cached.victims(lacking)
            for block in victims:
                self._held[block.block_id] = None
                self.free_block_queue.remove(block)
            self.free_block_queue.prepend_n(victims)
            self.report.evicted()
            self._blank += len(victims)
            # Fewer victims than lacking: a connector holds a block whose prefix is free.
            while self._blank < num_blocks:
                self._force()
        got: list[Any] = super().get_new_blocks(num_blocks)
        self._blank -= num_blocks
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
        held, parent = self._held, None
        if num_cached_blocks:
            parent = held[blocks[num_cached_blocks - 1].block_id]
            if parent is None or parent.node is None:
                return  # behind a block that was lost: nobody can hit these
        new = blocks[num_cached_blocks:num_full_blocks]
        found, spare = self.cached.store(parent, self.cached.path(block.block_hash for block in new))
        for block, cached in zip(new, found, strict=True):
            held[block.block_id] = cached
        self._blank_out(spare)

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        blocks = list(ordered_blocks)
        super().free_blocks(blocks)
        path, freed, spare = [], [], []
        for block in blocks:
            cached = self._held[block.block_id]
            if cached is not None and cached.node is not None:
                path.append(cached)
                if block.ref_cnt == 0:
                    freed.append((cached, block))
            elif block.ref_cnt == 0 and not block.is_null:
                if block.block_hash is None:
                    self._blank += 1
                else:
                    spare.append(block)
        self.cached.touch(path)
        self._blank_out(spare + self.cached.rest(freed))

    def evict_blocks(self, block_ids: set[int]) -> None:
        held = self.cached_block_hash_to_block
        for block_id in block_ids:
            block = self.blocks[block_id]
            cached = block.block_hash is not None and held.contain(block.block_hash, block_id)
            super().evict_blocks({block_id})
            if cached and block.ref_cnt == 0:
                self._to_front(block)

    def reset_prefix_cache(self) -> bool:
        if not super().reset_prefix_cache():
            return False
        self.cached.reset()
        self._held = [None] * self.num_gpu_blocks
        self._blank = self.free_block_queue.num_free_blocks
        return True

    def _maybe_evict_cached_block(self, block: Any) -> bool:
        cached = self._held[block.block_id]
        if cached is not None:
            self._held[block.block_id] = None
            if cached.node is not None:
                self._blank_out(self.cached.lose(cached, block))
        return bool(super()._maybe_evict_cached_block(block))

    def _emit_block_removed_events(self, block_hashes: list[Any]) -> None:
        """Only when the last copy goes: listeners keep a set of hashes."""
        if not self.enable_kv_cache_events:
            return
        held = self.cached_block_hash_to_block
        super()._emit_block_removed_events([h for h in block_hashes if held.get_one_block(h) is None])

    def _force(self) -> None:
        """Take the block that has been free longest, of those that no policy offers."""
        for block in self.free_block_queue.iter_blocks_after(None):
            if block.block_hash is not None:
                self.evict_blocks({block.block_id})
                return

    def _blank_out(self, blocks: Iterable[Any]) -> None:
        """Forget what free blocks hold: other copies are in use, or nobody can hit them."""
        for block in blocks:
            self._held[block.block_id] = None
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
