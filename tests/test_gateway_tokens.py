"""Prompts as token ids: templates against texts written by hand, segments against the whole text."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.gateway.knowledge.template import CannotRender, ChatTemplate
from kvist.gateway.knowledge.tokenizer import Embedded, HuggingFace, load
from kvist.gateway.knowledge.tokens import INLINE, Tokens
from kvist.gateway.prompt import engine_salt, parse, to_query
from kvist.model import Query, pack, unpack

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CHATML = (
    "{% if tools %}{{ '<|start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>"
    "{% endif %}"
    "{% for message in messages %}{{ '<|start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.arguments | tojson }}{% endfor %}"
    "<|end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}"
    "{% if not thinking | default(true) %}<none>{% endif %}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] | trim }} [/INST]"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ raise_exception('no ' + message['role']) }}{% endif %}{% endfor %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER: dict[str, Any] = {"role": "user", "content": "Hi"}


def write(folder: Path, *, template: str | None = CHATML, metaspace: bool = False) -> Path:
    """Tokenizer files as Hugging Face has them, trained on little."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None))
    if metaspace:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<|start|>", "<|end|>", "<unk>"],
        initial_alphabet=[] if metaspace else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([Path(__file__).read_text()], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> HuggingFace:
    return HuggingFace(folder)


def ids(tokenizer: HuggingFace, kind: str, **body: Any) -> list[int]:
    pending = tokenizer.prompt(kind, json.dumps(body).encode())
    packed = pending.finish()
    pending.keep()
    return unpack(packed).tolist()


def encoded(tokenizer: HuggingFace, text: str, special: bool = False) -> list[int]:
    return tokenizer._tokenizer.encode(text, add_special_tokens=special).ids


def render(source: str, *messages: dict[str, Any], **variables: Any) -> str:
    given = {"add_generation_prompt": True, **variables}
    return ChatTemplate(source, SPECIAL).render(list(messages), given)


def test_templates_render_as_their_authors_meant() -> None:
    assert render(CHATML, USER) == "<|start|>user\nHi<|end|><|start|>assistant\n"
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, "b", {"type": "refusal", "refusal": "c"}],
    }
    assert render(CHATML, parts, add_generation_prompt=False) == "<|start|>user\nabc<|end|>"
    assert render(PLAIN, parts) == "<s>[INST] a\nb\nc [/INST]", "one text where the template knows no parts"
    turns = [USER, {"role": "assistant", "content": "Yes"}, USER]
    assert render(PLAIN, *turns) == "<s>[INST] Hi [/INST]Yes</s>[INST] Hi [/INST]"
    assert "<none>" in render(CHATML, USER, thinking=False)


def test_tools_and_calls_have_the_shape_that_engines_give_them() -> None:
    tool = {"function": {"parameters": {"é": 1}, "name": "f"}, "type": "function"}
    text = render(CHATML, USER, tools=[tool])
    shown = '{"type": "function", "function": {"name": "f", "description": null, "parameters": {"é": 1}}}'
    assert shown in text
    for arguments, expected in (
        ('{"a": 1}', '{"a": 1}'),
        ("not json", "{}"),
        ("[1]", "{}"),
        ({"b": 2}, '{"b": 2}'),
    ):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        assert f"<call>{expected}<|end|>" in render(CHATML, message)
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "42"}]}
    assert "<|start|>tool\n42<|end|>" in render(CHATML, result)


def test_a_final_message_is_continued() -> None:
    turns = [USER, {"role": "assistant", "content": "The answer is  "}]
    settings = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(CHATML, *turns, **settings).endswith("<|start|>assistant\nThe answer is  ")
    parts = [USER, {"role": "assistant", "content": [{"type": "text", "text": "So"}]}]
    assert render(CHATML, *parts, **settings).endswith("So")
    with pytest.raises(CannotRender, match="changes the final message"):
        render("{% for message in messages %}x{% endfor %}", *turns, **settings)


def test_what_a_template_refuses_cannot_be_rendered() -> None:
    for source, message in (
        (PLAIN, {"role": "system", "content": "x"}),
        (CHATML, {"content": "no role"}),
        ("{{ messages[0].__class__.__mro__ }}", USER),
        ("{{ messages.append(1) }}", USER),
    ):
        with pytest.raises(CannotRender):
            render(source, message)
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate("{% for %}", {})


def test_developer_is_system_where_a_template_knows_no_developer() -> None:
    message = {"role": "developer", "content": "x"}
    assert "<|start|>system" in render(CHATML, message)
    assert render("{{ messages[0].role }}{# developer #}", message) == "developer"
    late = render(CHATML, {"role": "system", "content": "a"}, USER, {"role": "developer", "content": "b"})
    assert late == "<|start|>system\na\n\nb<|end|><|start|>user\nHi<|end|><|start|>assistant\n"


def test_images_differ_and_leave_what_stands_before_them(tokenizer: HuggingFace) -> None:
    def shown(url: str) -> list[int]:
        image = {"type": "image_url", "image_url": {"url": url}}
        before = {"role": "system", "content": "Look at this."}
        return ids(
            tokenizer,
            "chat",
            messages=[before, {"role": "user", "content": [image, {"type": "text", "text": "?"}]}],
        )

    one, same, other = shown("data:1"), shown("data:1"), shown("data:2")
    start = encoded(tokenizer, "<|start|>system\nLook at this.<|end|><|start|>user\n")
    assert one == same != other
    assert one[: len(start) - 1] == other[: len(start) - 1] == start[:-1], "but for the token on the border"


def test_completions_ids_and_the_rest(tokenizer: HuggingFace) -> None:
    whole = encoded(tokenizer, "abc def", special=True)
    assert whole[0] == 0, "the tokenizer's own first token"
    assert ids(tokenizer, "completion", prompt="abc def") == whole
    assert ids(tokenizer, "completion", prompt=["abc def"]) == whole
    assert ids(tokenizer, "completion", prompt="abc def", add_special_tokens=False) == whole[1:]
    assert (
        ids(tokenizer, "completion", prompt=[5, 6, 7])
        == ids(tokenizer, "completion", prompt=[[5, 6, 7]])
        == [5, 6, 7]
    )
    assert ids(tokenizer, "generate", text="abc def") == whole
    assert ids(tokenizer, "generate", input_ids=[5]) == [5]
    assert ids(tokenizer, "embeddings", input="abc def") == whole
    chat = ids(tokenizer, "chat", messages=[USER])
    assert chat == encoded(tokenizer, "<|start|>user\nHi<|end|><|start|>assistant\n")
    assert ids(tokenizer, "any", messages=[USER]) == chat
    assert ids(tokenizer, "any", prompt="abc def") == whole
    assert ids(tokenizer, "responses", input="Hi") == chat
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    assert ids(tokenizer, "responses", input=[message]) == chat
    assert ids(tokenizer, "responses", input="Hi", instructions="Be") == ids(
        tokenizer, "chat", messages=[{"role": "system", "content": "Be"}, USER]
    )


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("completion", {"prompt": ["a", "b"]}),
        ("completion", {"prompt": [-1]}),
        ("completion", {"prompt": [1 << 32]}),
        ("completion", {"prompt": [1.5]}),
        ("completion", {}),
        ("chat", {"messages": [USER], "chat_template": "{{ 1 }}"}),
        ("chat", {"messages": "x"}),
        ("responses", {"input": "x", "previous_response_id": "r"}),
        ("responses", {"input": [{"type": "function_call_output"}]}),
        ("chat", {"messages": [USER], "chat_template_kwargs": {"messages": 1, "tools": 5}}),
    ],
)
def test_what_cannot_be_told_says_so(tokenizer: HuggingFace, kind: str, body: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ids(tokenizer, kind, **body)


words = st.text(st.sampled_from("ab c\n.é世<|"), max_size=12)
turns = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant"]),
        st.lists(words | st.sampled_from(["<|end|>", "</s>"]), max_size=3),
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("metaspace", [False, True])
def test_segments_give_what_the_whole_text_gives(tmp_path: Path, metaspace: bool) -> None:
    """Also where clients write special tokens, and with a normalizer that looks at a segment's start."""
    made = HuggingFace(write(tmp_path / "made", metaspace=metaspace))

    @settings(max_examples=150, deadline=None)
    @given(turns)
    def check(chat: list[tuple[str, list[str]]]) -> None:
        messages = [{"role": role, "content": "".join(texts)} for role, texts in chat]
        text = made._templates["default"].render(messages, {"add_generation_prompt": True})
        for _ in range(2):
            assert ids(made, "chat", messages=messages) == encoded(made, text)

    check()
    assert made._cut is not None and made._cache


def test_what_was_seen_costs_no_work_again(tokenizer: HuggingFace) -> None:
    history = [USER, {"role": "assistant", "content": "long " * 1000}]
    body = json.dumps({"messages": history}).encode()
    first = tokenizer.prompt("chat", body)
    assert first.work >= 5000
    first.finish()
    first.keep()
    again = tokenizer.prompt(
        "chat", json.dumps({"messages": [*history, {"role": "user", "content": "new"}]}).encode()
    )
    assert again.work == len("user\nnew"), "the new message alone"


def test_the_cache_is_bounded(tokenizer: HuggingFace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.gateway.knowledge.tokenizer.CACHE_BYTES", 10_000)
    for i in range(100):
        ids(tokenizer, "completion", prompt=f"{i} " + "x" * 500)
    size = sum(len(text) + len(packed) for (text, _), packed in tokenizer._cache.items())
    assert size == tokenizer._cached_bytes <= 10_000


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load(str(tmp_path / "nothing"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load(str(tmp_path))
    write(tmp_path, template="{% if %}")
    with pytest.raises(ValueError, match="chat template"):
        load(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        load(str(tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    bare = HuggingFace(tmp_path / "tokenizer.json")
    assert not bare.chats
    with pytest.raises(ValueError, match="no chat template"):
        ids(bare, "chat", messages=[USER])


def test_templates_are_found_wherever_they_are_kept(tmp_path: Path) -> None:
    write(tmp_path, template=None)
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    config.write_text(json.dumps({"chat_template": named}))
    made = HuggingFace(tmp_path)
    assert ids(made, "chat", messages=[USER]) == encoded(made, "d")
    assert ids(made, "chat", messages=[USER], tools=[{}]) == encoded(made, "t")
    config.write_text("{}")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "j"}')
    assert ids(HuggingFace(tmp_path), "chat", messages=[USER]) == encoded(made, "j")
    (tmp_path / "chat_template.jinja").write_text("f")
    assert ids(HuggingFace(tmp_path), "chat", messages=[USER]) == encoded(made, "f")


def prepare(tokens: Tokens, kind: str, **body: Any) -> tuple[Query, bool]:
    raw = json.dumps(body).encode()
    parsed = parse(raw)
    query = to_query(1, kind, parsed, "tenant")

    async def run() -> bool:
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        tokens.prepare(query, kind, parsed, raw, done.set_result)
        return await done

    return query, tokens._loop.run_until_complete(run())


@pytest.fixture
def tokens(folder: Path) -> Any:
    loop = asyncio.new_event_loop()

    async def make() -> Tokens:
        return Tokens([str(folder), "toy=embedded"], lambda: {"ada": "base", "tia": "toy"})

    made = loop.run_until_complete(make())
    yield made
    made.close()
    loop.close()


def test_queries_become_token_ids_with_the_engines_salt(tokens: Tokens, tokenizer: HuggingFace) -> None:
    query, told = prepare(tokens, "chat", messages=[USER], model="base")
    expected = ids(tokenizer, "chat", messages=[USER])
    assert told and query.prompt == pack(expected) and query.length == len(expected) and query.salt == b""
    for body, salt in (
        ({"model": "ada"}, engine_salt("ada", "")),
        ({"model": "ada", "cache_salt": "s"}, engine_salt("ada", "s")),
        ({"model": "base", "lora_path": "path"}, engine_salt("path", "")),
        ({"model": "toy:bob"}, engine_salt("bob", "")),
    ):
        assert prepare(tokens, "chat", messages=[USER], **body)[0].salt == salt, body


def test_models_have_tokenizers_of_their_own(tokens: Tokens) -> None:
    for model, salt in (("toy", b""), ("tia", engine_salt("tia", "")), ("toy:tia", engine_salt("tia", ""))):
        query, told = prepare(tokens, "completion", prompt="abcdefgh", model=model)
        assert told and query.prompt == b"abcdefgh" and query.length == 2 and query.salt == salt
    with pytest.raises(ValueError):
        Embedded().prompt("embeddings", b'{"input": "x"}')


def test_what_stays_text_is_padded_and_counted(tokens: Tokens) -> None:
    text = to_query(1, "completion", parse(b'{"prompt": ["a", "b"]}'), "tenant")
    query, told = prepare(tokens, "completion", prompt=["a", "b"])
    assert not told and tokens.as_text == 1
    assert not prepare(tokens, "any", prompt="a")[1], "no engine caches what is only tokenised"
    assert len(query.prompt) % 4 == 0 and query.prompt.rstrip(b"\0") == text.prompt.replace(b'","', b'", "')
    assert query.length == len(query.prompt) // 4 and query.salt == text.salt


def test_long_prompts_are_tokenised_in_a_thread(tokens: Tokens, tokenizer: HuggingFace) -> None:
    text = "word " * INLINE
    query, told = prepare(tokens, "completion", prompt=text)
    assert told and tokens.in_threads == 1
    assert unpack(query.prompt).tolist() == encoded(tokenizer, text, special=True)
    prepare(tokens, "completion", prompt=text)
    assert tokens.in_threads == 1, "kept from the first time"
