"""A tiny Llama with random weights and a byte-level BPE tokenizer with a chat template, built on the spot.

`python tests/tiny_model.py FOLDER`. Needs torch, transformers and tokenizers; downloads nothing. The same
folder comes out of every build: the weights are seeded.
"""

from __future__ import annotations

import sys
from pathlib import Path

TEXT = [
    "The cache keeps what was asked before, and the queue keeps what was not.",
    "A twig grows from a branch; a branch grows from a tree; every leaf is the last of its line.",
    "Randomness makes the adversary blind. Learning makes the router see.",
    "user assistant system 0123456789 What is the answer? The answer is here.",
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def build(folder: Path) -> Path:
    """Writes model and tokenizer into `folder`, unless they are there."""
    if (folder / "done").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|eos|>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "done").touch()
    return folder


if __name__ == "__main__":
    build(Path(sys.argv[1]))
