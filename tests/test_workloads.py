"""The generators have the structure of the paper's benchmarks (section 4)."""

from collections import Counter, defaultdict
from itertools import islice, pairwise

import pytest

from kvist.model import Query
from kvist.prefix.tree import common_prefix
from kvist.workloads import WORKLOADS, make_workload
from kvist.workloads.base import Filler, fit, text_tokens


def shared(a: Query, b: Query) -> int:
    """Tokens that two prompts have in common."""
    limit = min(len(a.prompt), len(b.prompt))
    return common_prefix(a.prompt, 0, b.prompt, limit) // 4


@pytest.mark.parametrize("spec", ["gsp", "sharegpt", "ultrachat", "loogle"])
def test_streams_are_ordered_repeatable_and_paced(spec: str) -> None:
    workload = make_workload(spec, rate=20.0, seed=5)
    queries = list(workload)
    again = list(make_workload(spec, rate=20.0, seed=5))
    other = list(make_workload(spec, rate=20.0, seed=6))
    assert [(q.prompt, q.arrival) for q in queries] == [(q.prompt, q.arrival) for q in again]
    assert [q.prompt for q in queries] != [q.prompt for q in other]
    assert all(a.arrival < b.arrival for a, b in pairwise(queries))
    assert len({q.id for q in queries}) == len(queries)
    assert {q.output_tokens for q in queries} == {4}
    mean_gap = queries[-1].arrival / len(queries)
    assert mean_gap == pytest.approx(1 / 20, rel=5 / len(queries) ** 0.5)
    assert workload.total in (None, len(queries))
    assert "generated" in workload.describe()


def test_gsp_at_the_papers_parameters() -> None:
    groups: dict[str, list[Query]] = defaultdict(list)
    for query in make_workload("gsp"):
        groups[query.session].append(query)
    assert len(groups) == 128
    for number in range(128):
        members = groups[f"group{number}"]
        length = (512, 1024, 2048, 4096, 8192)[number % 5]
        assert len(members) == 32
        assert {q.length for q in members} == {length}
        assert {shared(members[0], q) for q in members[1:]} == {length // 2}
    assert shared(groups["group0"][0], groups["group5"][0]) == 0


def test_gsp_orders() -> None:
    def sessions(order: str) -> list[str]:
        return [q.session for q in make_workload(f"gsp:groups=6,prompts=4,order={order}")]

    names = [f"group{g}" for g in range(6)]
    assert sessions("grouped") == [name for name in names for _ in range(4)]
    assert sessions("round_robin") == names * 4
    drawn = sessions("random")
    assert Counter(drawn) == Counter(sessions("grouped"))
    assert drawn not in (sessions("grouped"), sessions("round_robin"))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_gsp_shared_ratio(ratio: float) -> None:
    queries = list(make_workload(f"gsp:groups=1,prompts=3,lengths=400,shared={ratio}"))
    assert {q.length for q in queries} == {400}
    assert shared(queries[0], queries[1]) == 400 * ratio


@pytest.mark.parametrize("name", ["sharegpt", "ultrachat"])
def test_conversations_resend_their_history(name: str) -> None:
    last: dict[str, Query] = {}
    turns: Counter[str] = Counter()
    for query in make_workload(name):
        before = last.get(query.session)
        history = before.prompt + before.answer if before else b""
        assert query.prompt.startswith(history)
        assert query.length == len(history) // 4 + 1024
        assert len(query.answer) == 4 * query.output_tokens
        last[query.session] = query
        turns[query.session] += 1
    assert [turns[f"client{i}"] for i in range(128)] == [2, 4, 6, 8] * 32


def test_conversations_are_interleaved() -> None:
    first = [q.session for q in islice(make_workload("sharegpt"), 60)]
    assert len(set(first)) > 30


def test_loogle_questions_share_their_document() -> None:
    documents: dict[str, list[Query]] = defaultdict(list)
    order = []
    for query in make_workload("loogle:documents=16"):
        documents[query.session].append(query)
        order.append(query.session)
    assert len(documents) == 16
    head = len(text_tokens("Input: ")) // 4
    tail = len(text_tokens(" Question: ")) // 4
    for number in range(16):
        asked = documents[f"document{number}"]
        length = (1024, 2048, 4096, 8192)[number % 4]
        assert 4 <= len(asked) <= 12
        assert {shared(asked[0], q) for q in asked[1:]} == {head + length + tail}
    assert order != sorted(order)


def test_generators_are_lazy() -> None:
    stream = iter(make_workload("gsp:groups=1000,prompts=1000,lengths=8192"))
    assert [q.id for q in islice(stream, 3)] == [0, 1, 2]


def test_filler_pieces_differ_from_their_first_token() -> None:
    filler = Filler(0)
    pieces = [filler.piece(number, 8) for number in range(500)]
    assert len({piece[:4] for piece in pieces}) == 500
    assert len(filler.piece(3, 3_000_000)) == 12_000_000  # longer than the pool
    assert filler.piece(3, 0) == b""


def test_text_is_cut_or_repeated_to_length() -> None:
    assert text_tokens("abcde") == b"abcde\0\0\0"
    assert fit(b"abcdefgh", 1) == b"abcd"
    assert fit(b"abcd", 3) == b"abcd" * 3
    assert fit(b"", 2) == bytes(8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", "unknown workload 'nope': choose one of gsp"),
        ("gsp:colour=red", "unknown parameter 'colour'"),
        ("gsp:groups=many", "groups must be a number"),
        ("gsp:groups=0", "at least 1"),
        ("gsp:shared=1.5", "between 0 and 1"),
        ("gsp:order=odd", "order must be one of"),
        ("gsp:lengths=1/x", "integers joined by /"),
        ("gsp:groups=2,prompts", "is not key=value"),
        ("gsp:file.jsonl", "takes no file"),
        ("loogle:documents=0", "at least 1"),
        ("sharegpt:clients=0", "at least 1"),
        ("trace", "a file is needed"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_workload(spec)


def test_rate_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rate must be above 0"):
        make_workload("gsp", rate=-1.0)


def test_registry_describes_itself() -> None:
    for name, workload in WORKLOADS.items():
        assert workload.name == name
        assert workload.description and workload.source
