"""Loaders of the datasets' and traces' own formats, and what they say about bad lines."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.model import unpack
from kvist.workloads import make_workload
from kvist.workloads.base import text_tokens
from kvist.workloads.trace import HASH_BLOCK, expand

TRACES = Path(__file__).parents[2] / "shared" / "traces"


def jsonl(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines, compressed if the name ends in .gz."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def block(timestamp: float, length: int, ids: list[int], output: int = 5) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": ids}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_hash_blocks(tmp_path: Path, suffix: str) -> None:
    rows = [block(0, 1000, [7, 8]), block(500, 1030, [7, 8, 9]), block(2000, 20, [9], 0)]
    path = jsonl(tmp_path / f"trace.{suffix}", rows)
    queries = list(make_workload(f"trace:{path}"))
    assert [q.length for q in queries] == [1000, 1030, 20]
    assert [q.arrival for q in queries] == [0.0, 0.5, 2.0]
    assert [q.output_tokens for q in queries] == [5, 5, 1]
    assert queries[1].prompt.startswith(queries[0].prompt)
    assert queries[2].prompt == queries[1].prompt[1024 * 4 :] + expand([9], 512)[6 * 4 : 20 * 4]


def test_speed_rate_loop_and_limit(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [block(1000 * i, 10, [i]) for i in range(11)])
    fast = list(make_workload(f"trace:{path}:speed=4"))
    assert [q.arrival for q in fast] == [i / 4 for i in range(11)]
    paced = list(make_workload(f"trace:{path}", rate=5.0))
    assert len(paced) / paced[-1].arrival == pytest.approx(5.0)
    looped = list(make_workload(f"trace:{path}:loop=3,limit=4"))
    assert len({q.id for q in looped}) == len(looped) == 12
    assert [q.arrival for q in looped] == [float(i) for i in range(12)]
    assert looped[0].prompt == looped[4].prompt
    later = list(make_workload(f"trace:{path}:skip=5,limit=3"))
    whole = list(make_workload(f"trace:{path}"))
    assert [q.prompt for q in later] == [q.prompt for q in whole[5:8]]
    assert [q.arrival for q in later] == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="skip must be at least 0"):
        make_workload(f"trace:{path}:skip=-1")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4), st.data())
def test_block_ids_map_injectively(ids: list[int], data: st.DataObject) -> None:
    length = data.draw(st.integers(1, HASH_BLOCK * len(ids)))
    tokens = unpack(expand(ids, length))
    assert len(tokens) == length
    firsts = tokens[::HASH_BLOCK]
    back = (firsts.astype(np.uint64) * pow(2_654_435_761, -1, 2**32)) % 2**32
    assert back.tolist() == ids[: len(firsts)]


def test_a_long_trace_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(block(0, 10, [1])) + "\n" + "not json\n")
    stream = iter(make_workload(f"trace:{path}"))
    assert next(stream).length == 10  # before the bad line is reached
    with pytest.raises(ValueError, match=r"t\.jsonl:2: "):
        next(stream)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (block(0, 1000, [1]), "field 'hash_ids' has 1 blocks of 512 tokens, input_length 1000 needs 2"),
        (block(0, -1, [1]), "input_length must be at least 1"),
        (block(0, 10, [-1]), "'hash_ids' must hold numbers from 0"),
        (block(-1, 10, [1]), "'timestamp' goes back in time"),
        ({**block(0, 1, [1]), "input_length": "x"}, r"input_length"),
        ({"timestamp": 0, "hash_ids": [1]}, "input_length"),
        ([1], "object"),
    ],
)
def test_bad_hash_blocks_name_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    path = jsonl(tmp_path / "t.jsonl", [block(0, 10, [1]), row])
    with pytest.raises(ValueError, match=rf"t\.jsonl:2: .*{message}"):
        list(make_workload(f"trace:{path}"))


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl: No such file"):
        make_workload(f"trace:{tmp_path / 'gone.jsonl'}")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="the file is empty"):
        make_workload(f"trace:{empty}")
    odd = jsonl(tmp_path / "odd.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match=r"odd\.jsonl:1: unknown trace format"):
        make_workload(f"trace:{odd}")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"messages": []}\n' * 1000)[:60])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: cannot be read"):
        list(make_workload(f"trace:{cut}"))


def test_token_ids(tmp_path: Path) -> None:
    rows = [{"input_tok_ids": [1, 2, 3], "output_toks": 7, "arrival_time_ns": 5 * 10**8}]
    (query,) = make_workload(f"trace:{jsonl(tmp_path / 't.jsonl', rows)}")
    assert unpack(query.prompt).tolist() == [1, 2, 3]
    assert (query.output_tokens, query.arrival) == (7, 0.5)
    rows[0]["input_tok_ids"] = [1, -2]
    with pytest.raises(ValueError, match=r"t\.jsonl:1: token ids"):
        list(make_workload(f"trace:{jsonl(tmp_path / 't.jsonl', rows)}"))


def test_messages_become_one_request_an_answer(tmp_path: Path) -> None:
    said = [
        ("system", "be brief"),
        ("user", "hello"),
        ("assistant", "hi"),
        ("user", "bye"),
        ("assistant", "so"),
    ]
    row = {"session": "s", "messages": [{"role": role, "content": text} for role, text in said]}
    first, second = make_workload(f"trace:{jsonl(tmp_path / 't.jsonl', [row])}")
    assert second.prompt.startswith(first.prompt + first.answer)
    assert first.answer == text_tokens("hi")
    assert first.session == second.session == "s"
    bad = jsonl(tmp_path / "bad.jsonl", [{"messages": ["hello"]}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: each message needs a text field 'role'"):
        list(make_workload(f"trace:{bad}"))


def test_azure_lengths(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    queries = list(make_workload(f"trace:{path}"))
    assert [(q.length, q.output_tokens) for q in queries] == [(374, 44), (396, 109)]
    assert queries[1].arrival == pytest.approx(4.314579)
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,many,44\n")
    with pytest.raises(ValueError, match=r"a\.csv:2: expected TIMESTAMP"):
        list(make_workload(f"trace:{path}"))


CHATS = {
    "conversations": lambda turns: {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    },
    "messages": lambda turns: {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    },
    "data": lambda turns: {"data": turns},
}


@pytest.mark.parametrize("shape", CHATS)
@pytest.mark.parametrize("name", ["sharegpt", "ultrachat"])
def test_chat_files(tmp_path: Path, name: str, shape: str) -> None:
    long = [CHATS[shape]([f"{word} {c} {t}" for t in range(4) for word in ("ask", "say")]) for c in range(2)]
    short = CHATS[shape](["only one", "turn"])
    path = jsonl(tmp_path / "chat.jsonl", [short, *long])
    workload = make_workload(f"{name}:{path}:clients=2,message=16,output=3")
    queries = list(workload)
    assert "from chat.jsonl" in workload.describe()
    assert len(queries) == 2 + 4
    first = next(q for q in queries if q.session == "client1")
    assert first.length == 16
    assert first.prompt.startswith(b"ask 1 0\0ask 1 0\0")
    assert first.answer == b"say 1 0\0say "


def test_sharegpt_as_one_json_list(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([CHATS["conversations"](["a", "b", "c", "d"])]))
    assert len(list(make_workload(f"sharegpt:{path}:clients=1"))) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": 1}, "'conversations', 'messages' or 'data'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "text field 'value'"),
        ({"data": [1]}, "must be text"),
        ("text", "an object expected"),
    ],
)
def test_bad_chats(tmp_path: Path, row: Any, message: str) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [row])
    with pytest.raises(ValueError, match=rf"chat\.jsonl:1: .*{message}"):
        list(make_workload(f"sharegpt:{path}"))


def test_too_few_conversations(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "chat.jsonl", [CHATS["data"](["a", "b", "c", "d"])])
    with pytest.raises(ValueError, match="only 1 conversations are long enough for 128 clients"):
        list(make_workload(f"ultrachat:{path}"))


QA = [{"Q": "who?", "A": "he"}, {"Q": "where?", "A": "there"}]


@pytest.mark.parametrize(
    "row",
    [
        {"input": "word " * 2000, "qa_pairs": QA},
        {"input": "word " * 2000, "qa_pairs": json.dumps(QA)},
        {"input": "word " * 2000, "qa_pairs": str(QA)},
        {"context": "word " * 2000, "qa_pairs": QA},
    ],
)
def test_loogle_file(tmp_path: Path, row: dict[str, Any]) -> None:
    path = jsonl(tmp_path / "docs.jsonl", [row])
    queries = list(make_workload(f"loogle:{path}:documents=1"))
    assert len(queries) == 2
    document = text_tokens("Input: ") + text_tokens("word " * 2000)[: 4 * 1024] + text_tokens(" Question: ")
    assert all(q.prompt.startswith(document) for q in queries)
    assert {q.prompt[len(document) :].rstrip(b"\0") for q in queries} == {b"who?", b"where?"}


def test_bad_loogle(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "docs.jsonl", [{"input": "text"}])
    with pytest.raises(ValueError, match=r"docs\.jsonl:1: field 'qa'"):
        list(make_workload(f"loogle:{path}"))
    path = jsonl(tmp_path / "docs.jsonl", [{"input": "text", "qa_pairs": QA}])
    with pytest.raises(ValueError, match="gives only 1 documents, not 3"):
        list(make_workload(f"loogle:{path}:documents=3"))


@pytest.mark.parametrize(
    "spec",
    [
        "trace:mooncake_conversation.jsonl",
        "trace:tau_airline_gpt4o_messages.jsonl.gz",
        "trace:sharegpt_llama31_tokids_300.jsonl.gz",
        "trace:azure2023_conv.csv",
        "sharegpt:sharegpt_zh_1k_messages.jsonl.gz",
        "loogle:loogle_sample_docs.jsonl.gz",
    ],
)
def test_real_files(spec: str) -> None:
    name, file = spec.split(":")
    if not (TRACES / file).exists():
        pytest.skip(f"{file} is not in {TRACES}")
    queries = list(islice(make_workload(f"{name}:{TRACES / file}"), 200))
    assert len(queries) == 200
    assert all(q.length > 0 and q.output_tokens > 0 for q in queries)
