"""What knowing more costs the gateway: prompts as text, as token ids (new and seen before), and KV events.

    python benchmarks/gateway_knowledge.py [FOLDER]

FOLDER has Hugging Face tokenizer files; without it a small byte-level BPE is trained on this project's docs.
Prints medians, and the ratio to text mode, all in one run.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec

from kvist.gateway.knowledge.feed import Feed
from kvist.gateway.knowledge.tokenizer import HuggingFace
from kvist.gateway.prompt import parse, to_query
from kvist.prefix.events import EventIndex

ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message.role + '\\n' + message.content + '<|end|>' }}"
    "{% endfor %}<|start|>assistant"
)
ROUNDS = 60


def train(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<|start|>", "<|end|>"], show_progress=False
    )
    made.train_from_iterator([path.read_text() for path in (ROOT / "docs").glob("*.md")], trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def seconds(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def prompts(tokenizer: HuggingFace) -> None:
    rng = Random(0)
    words = (ROOT / "docs" / "gateway.md").read_text().split()

    def text(characters: int) -> str:
        return " ".join(rng.choice(words) for _ in range(characters // 6))

    def as_text(body: bytes) -> object:
        return to_query(0, "chat", parse(body), "")

    def tokenise(body: bytes) -> int:
        pending = tokenizer.prompt("chat", body)
        ids = pending.finish()
        pending.keep()
        return len(ids) // 4

    print(f"{'characters':>10} {'tokens':>7} {'text':>9} {'new':>19} {'seen before':>19}")
    for characters in (500, 2_000, 16_000, 64_000):
        plain, new, seen = [], [], []
        tokens = 0
        for _ in range(ROUNDS):
            history = [{"role": "system", "content": text(characters)}]
            bodies = [
                json.dumps({"messages": [*history, {"role": "user", "content": text(100)}]}).encode()
                for _ in range(2)
            ]
            plain.append(seconds(as_text, bodies[0]))
            new.append(seconds(tokenise, bodies[0]))
            seen.append(seconds(tokenise, bodies[1]))
            tokens = tokenise(bodies[1])
        base = statistics.median(plain)
        columns = [
            f"{statistics.median(times) * 1e6:9.0f} us {statistics.median(times) / base:5.0f} x"
            for times in (new, seen)
        ]
        print(f"{characters:10} {tokens:7} {base * 1e6:6.0f} us {columns[0]} {columns[1]}")


def events() -> None:
    rng = Random(0)
    index = EventIndex()
    index.add_worker(0, 0)
    feed = Feed(index, 0, clock=time.time)
    took, tokens, name = [], 4 * 32 * 16, 0
    for number in range(400):
        batch = []
        for _ in range(4):  # requests of a step
            names, name = list(range(name, name + 32)), name + 32
            batch.append(
                {
                    "type": "BlockStored",
                    "block_hashes": names,
                    "parent_block_hash": None,
                    "token_ids": [rng.randrange(100_000) for _ in range(512)],
                    "block_size": 16,
                    "lora_id": None,
                    "medium": "GPU",
                }
            )
        payload = msgspec.msgpack.encode([time.time(), batch])
        took.append(seconds(feed.offer, number, payload))
    each = statistics.median(took) / tokens
    print(f"KV events: {each * 1e6:.2f} us a token stored, {1 / each / 1e6:.1f} M tokens/s on one core")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else train(Path(folder))
        prompts(HuggingFace(path))
    events()


if __name__ == "__main__":
    main()
