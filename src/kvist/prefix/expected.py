"""What workers will hold before their engines say so: prompts on their way, and the ends of answers.

Between a decision and the engine's word for it lie a queue, a prefill and the word's own way here. A prompt
counts as held where it was sent from the decision on: what is sent there after it is served after it, and
finds it computed. So a burst of equal prompts meets on one worker instead of being spread over all that do
not hold it yet. This ends, block by block, with the engine's word, with all that the engine clears, with a
request that fails, and `grace` seconds after its answer, when no word can be on its way any more.

An engine caches the answer too, but for its last token. Its tokens are not known here, only how many they
are: a prompt that begins with an answered one and goes on is taken for its next turn, which brings the answer
along. That concerns the blocks behind the last one that the engine told of: a long answer is told of while it
is made, so what a client changed in it is seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count

from kvist.model import Query
from kvist.prefix.hashing import root_key


class Sent:
    """A prompt at a worker. `end`: tokens of it and of its answer that are cached, 0 until it is answered."""

    __slots__ = ("end", "keys", "number", "query", "rest", "slot", "tip", "until")

    def __init__(self, number: int, query: Query, slot: int) -> None:
        self.number = number
        self.query = query
        self.slot = slot
        self.keys: Sequence[int] = ()
        # Key of the last block on its way that the engine told of, or of the prompt's last whole one.
        self.tip = 0
        self.rest = b""  # of the prompt, behind the tip
        self.end = 0
        self.until = 0.0


class Expected:
    """most: prompts of a worker, the newest. grace: seconds.

    masks: own key -> mask of the workers that will hold the block. tips: own key -> prompts whose answers go
    on behind that block. confirmed, expired: blocks that came, and that did not come in time.
    """

    def __init__(self, most: int, grace: float) -> None:
        self.most = most
        self.grace = grace
        self.masks: dict[int, int] = {}
        self.tips: dict[int, list[Sent]] = {}
        self.confirmed = 0
        self.expired = 0
        # slot -> own key -> number of the first prompt that brings it, and how many do since
        self._by_key: dict[int, dict[int, tuple[int, int]]] = {}
        self._sent: dict[int, dict[Query, Sent]] = {}  # slot -> oldest first
        self._fading: deque[Sent] = deque()  # answered, in this order
        self._numbers = count()

    def add_worker(self, slot: int) -> None:
        self._by_key[slot] = {}
        self._sent[slot] = {}

    def remove_worker(self, slot: int) -> None:
        self.clear(slot)
        del self._by_key[slot], self._sent[slot]

    def clear(self, slot: int) -> None:
        """The worker's cache is empty, or what it holds is not known any more."""
        for sent in list(self._sent[slot].values()):
            self._forget(sent)

    def send(self, query: Query, slot: int) -> Sent:
        """To be told with `begin` what it brings, once the worker's block size is known."""
        here = self._sent[slot]
        if query in here:
            self._forget(here[query])
        sent = here[query] = Sent(next(self._numbers), query, slot)
        if len(here) > self.most:
            self._expire(next(iter(here.values())))
        return sent

    def waiting(self, slot: int) -> Iterable[Sent]:
        """All that are not answered too long ago."""
        return self._sent[slot].values()

    def begin(self, sent: Sent, stride: int, keys: list[int], new: list[int]) -> None:
        """`keys` of its whole blocks of `stride` bytes, and those of them that the worker does not hold."""
        prompt, bit, mine = sent.query.prompt, 1 << sent.slot, self._by_key[sent.slot]
        sent.keys = new
        alone = (sent.number, 1)
        for key in new:
            if key in mine:
                first, others = mine[key]
                mine[key] = (first, others + 1)
            else:
                mine[key] = alone
                self.masks[key] = self.masks.get(key, 0) | bit
        sent.tip = keys[-1] if keys else root_key(sent.query.salt)
        sent.rest = prompt[len(keys) * stride :]
        self.tips.setdefault(sent.tip, []).append(sent)

    def answered(self, query: Query, slot: int, output: int, now: float) -> None:
        """output: tokens of the answer, 0 if they were not counted."""
        sent = self._sent[slot].get(query)
        if sent is not None:
            sent.end = query.length + output - 1 if output and query.length else 0
            sent.until = now + self.grace
            self._fading.append(sent)

    def dropped(self, query: Query, slot: int) -> None:
        """It failed, or its client left."""
        sent = self._sent[slot].get(query)
        if sent is not None:
            self._forget(sent)

    def expire(self, now: float) -> None:
        while self._fading and self._fading[0].until <= now:
            sent = self._fading.popleft()
            if self._sent.get(sent.slot, {}).get(sent.query) is sent:
                self._expire(sent)

    def stored(self, slot: int, above: int, keys: list[int], tokens: bytes, stride: int) -> None:
        """The engine's word for a chain of blocks behind the block `above`."""
        if not self._sent[slot]:
            return
        mine, tips = self._by_key[slot], self.tips
        for key in keys if mine else ():
            if key in mine:
                del mine[key]
                self.confirmed += 1
                self._unmask(slot, key)
        for at, before in enumerate((above, *keys[:-1])):
            if before in tips:
                for sent in list(tips[before]):
                    if sent.slot == slot and tokens.startswith(sent.rest, at * stride):
                        self._untip(sent)
                        sent.tip, sent.rest = keys[at], b""
                        tips.setdefault(keys[at], []).append(sent)

    def _expire(self, sent: Sent) -> None:
        before = len(self._by_key[sent.slot])
        self._forget(sent)
        self.expired += before - len(self._by_key[sent.slot])

    def _forget(self, sent: Sent) -> None:
        del self._sent[sent.slot][sent.query]
        mine = self._by_key[sent.slot]
        for key in sent.keys:
            first, bring = mine.get(key, (sent.number + 1, 0))
            if first > sent.number:  # what it brought has come
                continue
            if bring > 1:
                mine[key] = (first, bring - 1)
            else:
                del mine[key]
                self._unmask(sent.slot, key)
        self._untip(sent)

    def _unmask(self, slot: int, key: int) -> None:
        mask = self.masks[key] & ~(1 << slot)
        if mask:
            self.masks[key] = mask
        else:
            del self.masks[key]

    def _untip(self, sent: Sent) -> None:
        here = self.tips.get(sent.tip, [])
        if sent in here:
            here.remove(sent)
            if not here:
                del self.tips[sent.tip]
