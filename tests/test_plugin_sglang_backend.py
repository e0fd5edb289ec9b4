"""How the policy gets into SGLang: version and feature checks, both switches, and SGLang's request cycle."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from kvist.cache import RECOMMENDED
from kvist.plugins import Unsupported
from kvist.plugins.sglang import backend, register

installed = pytest.mark.skipif(
    find_spec("sglang") is None, reason="SGLang is not installed: make test-sglang runs this"
)


def test_other_versions_are_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"SGLang 0\.4\.6 is not supported.*0\.5\.23"):
        backend.check_version("0.4.6", {})
    backend.check_version("0.4.6", {backend.UNTESTED: "1"})
    backend.check_version("0.5.23", {})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"KVIST_EVICTION": "belady"}, "unknown policy 'belady'"),
        ({"KVIST_EVICTION": "slru,protect_after=0"}, "protect_after must be at least 1"),
        ({"KVIST_EVICTION": "rlt", "KVIST_EVICTION_SEED": "x"}, "KVIST_EVICTION_SEED=x"),
    ],
)
def test_a_bad_variable_ends_the_process_with_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        register()
    assert message in str(ended.value) and "\n" not in str(ended.value)


def test_only_the_backend_named_means_the_recommended_policy() -> None:
    assert backend.policy_of({}).name == RECOMMENDED == "hedge"
    assert backend.policy_of({"KVIST_EVICTION": "slru,protect_after=3"}).protect_after == 3  # type: ignore[attr-defined]
    draws = [backend.policy_of({"KVIST_EVICTION_SEED": seed}).rng.random() for seed in ("4", "4", "5")]
    assert draws[0] == draws[1] != draws[2]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's cache factory with its configuration published, and the plugin loaded as SGLang loads it."""
    import sglang_radix
    from sglang.srt import plugins
    from sglang.srt.mem_cache import registry
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_context

    original = registry.default_radix_cache_factory

    def build(environ: dict[str, str], **changes: Any) -> Any:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(plugins, "_plugins_loaded", False)
        plugins.load_plugins()
        settings = {"model_path": "none", "radix_cache_backend": None}
        context = {
            "params": sglang_radix.params(64, 1),
            "disable_radix_cache": False,
            "is_hybrid_swa": False,
            "is_hybrid_ssm": False,
            "enable_hierarchical_cache": False,
            "full_tokens_per_layer": None,
        }
        for name, value in changes.items():
            (context if name in context else settings)[name] = value
        with get_context().override_server_args(**settings):
            return registry.create_tree_cache(SimpleNamespace(server_args=None, **context))

    yield build
    registry.default_radix_cache_factory = original
    registry._RADIX_CACHE_REGISTRY.pop(backend.BACKEND, None)
    HookRegistry.reset()


@installed
def test_off_by_default(served: Any) -> None:
    assert type(served({})).__name__ == "UnifiedRadixCache"


@installed
def test_on_by_the_variable_alone(served: Any) -> None:
    cache = served({"KVIST_EVICTION": "l-lru"})
    assert (type(cache).__name__, cache.policy.name) == ("KvistRadixCache", "l-lru")


@installed
def test_on_by_the_flag_alone(served: Any) -> None:
    cache = served({}, radix_cache_backend="kvist")
    assert (type(cache).__name__, cache.policy.name) == ("KvistRadixCache", RECOMMENDED)


@installed
def test_a_server_without_prefix_caching_keeps_sglangs_own(served: Any) -> None:
    assert type(served({"KVIST_EVICTION": "rlt"}, disable_radix_cache=True)).__name__ == "UnifiedRadixCache"


@installed
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_hybrid_swa": True}, "sliding-window attention"),
        ({"is_hybrid_ssm": True}, "Mamba"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"enable_lmcache": True}, "--enable-lmcache"),
        ({"enable_session_radix_cache": True}, "--enable-session-radix-cache"),
        ({"radix_cache_backend": "kvist", "disable_radix_cache": True}, "--disable-radix-cache"),
    ],
)
def test_features_that_the_cache_does_not_hold_are_refused(
    served: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unsupported, match=message):
        served({"KVIST_EVICTION": "rlt"}, **changes)


@installed
def test_another_sglang_is_refused_when_a_policy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", lambda name: "0.5.99")
    monkeypatch.setenv("KVIST_EVICTION", "rlt")
    with pytest.raises(SystemExit, match=r"SGLang 0\.5\.99 is not supported"):
        register()


@installed
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("policy", ["rlt", "slru"])
def test_sglangs_request_cycle(policy: str, page: int) -> None:
    """Chunked prefill through the real checkpoint and row pool: each request is one hit, slots add up."""
    from sglang_radix import Engine, MatchPrefixParams, key_of, make_cache, request

    cache = make_cache(40 * page, page, policy, events=True, rows=4)
    engine = Engine(cache)
    hits: list[Any] = []
    monitored = cache.policy.hit
    cache.policy.hit = lambda node, now: (hits.append(node), monitored(node, now))

    def serve(tokens: tuple[int, ...], chunk: int) -> int:
        req = request(tokens, None)
        for _ in range(3):  # the scheduler matches a waiting request again each time it tries to admit it
            match = cache.match_prefix(MatchPrefixParams(key=key_of(tokens), req=req))
        req.kv.req_pool_idx = cache.req_to_token_pool.alloc_rows(1)[0]
        req.last_node, req.kv.cache_protected_len = match.last_device_node, match.device_prefix_len
        req.lock = cache.lock(req.last_node)
        row = cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        row[: match.device_prefix_len] = cache.path_device_indices(req.last_node).int()
        done = match.device_prefix_len
        while done < len(tokens):
            end = min(done + chunk, len(tokens))
            need = -(-(end - done) // page) * page
            lacking = need - engine.allocator.available_size()
            if lacking > 0:
                cache.evict(SimpleNamespace(num_tokens=lacking))
            own = engine.allocator.alloc(need)
            row[done:end] = own[: end - done].int()
            for i in range(done, end):
                engine.content[int(row[i])] = (None, tokens[: i + 1])
            cache.checkpoint(req, up_to=end)
            done = end
            assert req.kv.cache_protected_len == end // page * page
        tail = row[req.kv.cache_protected_len : len(tokens)]
        engine.allocator.free_segment(tail, start_pos=req.kv.cache_protected_len)
        cache.unlock(req.lock)
        cache.req_to_token_pool.free_slots.append(req.kv.req_pool_idx)
        engine.check()
        return int(match.device_prefix_len)

    shared = tuple(range(8 * page))
    assert serve(shared + (1,) * page, 4 * page) == 0
    assert not hits
    assert serve(shared + (2,) * page, 4 * page) == 8 * page
    assert len({id(node) for node in hits}) == len(hits) > 0
    once = len(hits)
    for i in range(3, 40):
        serve(tuple(100 * i + j for j in range(12 * page)), 8 * page)
    assert cache.host.evicted_blocks > 300
    assert len(hits) == once
    assert cache.protected_size() == 0


@installed
@pytest.mark.parametrize("page", [1, 16])
def test_bigram_keys(page: int) -> None:
    """EAGLE keys count pairs of tokens: a cut leaf keeps one more token than pairs."""
    from sglang_radix import EvictParams, InsertParams, MatchPrefixParams, RadixKey, make_cache

    cache = make_cache(64 * page, page, "rlt", eagle=True)
    tokens = list(range(8 * page + 1))
    slots = cache.token_to_kv_pool_allocator.alloc(8 * page)
    cache.insert(InsertParams(key=RadixKey(array("q", tokens)), value=slots))
    for left in range(7, 0, -1):
        assert cache.evict(EvictParams(num_tokens=page)).num_tokens_evicted == page
        match = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens))))
        assert match.device_prefix_len == left * page == cache.evictable_size()
        held = cache.path_device_indices(match.last_device_node)
        assert held.tolist() == slots[: left * page].tolist()
        node = match.last_device_node
        assert list(node.key) == [(i, i + 1) for i in range(left * page)]
    cache.evict(EvictParams(num_tokens=page))
    assert cache.evictable_size() == 0
    assert cache.token_to_kv_pool_allocator.available_size() == 64 * page


@installed
def test_a_waiting_prefix_is_recent_but_no_hit() -> None:
    from sglang_radix import Engine, EvictParams, key_of, make_cache

    cache = make_cache(20, 1, "l-lru")
    engine = Engine(cache)
    for tokens in ((1,) * 10, (2,) * 10):
        run = engine.start(tokens)[1]
        assert run is not None
        engine.finish(run)
    cache.touch_prefix(key_of((1,) * 10))
    cache.evict(EvictParams(num_tokens=10))
    assert {prefix for _, _, prefix in engine.nodes()} == {(1,) * 10}
    assert all(node.twin.hits == 0 for node, _, _ in engine.nodes())
    engine.check()
