"""Puts together what the settings ask for: an index of text or tokens, and KV events."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvist.gateway.knowledge.believed import BelievedIndex
from kvist.gateway.knowledge.feed import Feed
from kvist.gateway.knowledge.subscriber import Subscriptions
from kvist.gateway.knowledge.tokens import Tokens
from kvist.gateway.prompt import BYTES_PER_TOKEN
from kvist.gateway.settings import Settings
from kvist.model import TOKEN_BYTES
from kvist.prefix.base import PrefixKnowledge
from kvist.prefix.events import EventIndex
from kvist.prefix.index import PrefixIndex

TEXT_BLOCK = 16  # bytes of text that match or miss together
TOKEN_BLOCK = 16  # tokens, vLLM's usual block
EXPECTED_PROMPTS = 256  # of a worker, between their routing and the engine's word; vLLM's usual batch


class Knowledge:
    """`index` for the router, `own` the part of it that rests on decisions alone.

    `tokens` and `subscriptions` are None where the settings do not ask for them.
    """

    def __init__(
        self, settings: Settings, adapters: Callable[[], Mapping[str, str]], log: Callable[..., None]
    ) -> None:
        self.tokens: Tokens | None = None
        self.subscriptions: Subscriptions | None = None
        if not settings.tokenizer:
            self.own = PrefixIndex(
                unit=1, block_size=TEXT_BLOCK, units_per_token=BYTES_PER_TOKEN, budget=settings.index_tokens
            )
            self.index: PrefixKnowledge = self.own
            return
        self.tokens = Tokens(settings.tokenizer, adapters)
        for name in self.tokens.without_template:
            log("no chat template", tokenizer=name, effect="chat prompts stay text")
        self.own = PrefixIndex(unit=TOKEN_BYTES, block_size=TOKEN_BLOCK, budget=settings.index_tokens)
        self.index = self.own
        if settings.follows_events:
            events = EventIndex(expect=EXPECTED_PROMPTS)
            feeds: dict[int, list[Feed]] = {}
            self.index = believed = BelievedIndex(self.own, events, feeds)
            self.subscriptions = Subscriptions(
                events, feeds, topic=settings.kv_events_topic, restarted=believed.restarted, log=log
            )

    def close(self) -> None:
        if self.tokens is not None:
            self.tokens.close()
        if self.subscriptions is not None:
            self.subscriptions.close()
