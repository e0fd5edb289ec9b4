"""Measuring steps on the hardware at hand: a decoder of the given shape with random weights and a KV cache.

What is timed is the model's own work (matrix products, attention over the cache), as PyTorch's kernels do it,
not an engine's scheduler, nor the fused kernels of one. On a GPU: bfloat16, PyTorch's flash attention, CUDA
events. The table has the columns of `kvist.engine.measured` and is fitted like any other. Needs PyTorch: the
extra `calibrate`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kvist.workloads.files import count, records

REPEATS = 5
WARM_UP = 3  # steps before those that are timed: kernels are chosen, memory is taken, clocks rise
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like decoder. Raises ValueError if the heads do not divide the width evenly."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"shape: {name} must be at least 1, not {getattr(self, name)}")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError("shape: hidden must be a multiple of heads, and heads of kv_heads")

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Numbers in the weight matrices that `Model` makes."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocab

    @property
    def kv_elements(self) -> int:
        """Numbers in the KV cache for one token."""
        return 2 * self.layers * self.kv_heads * self.head


SHAPES = {
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "llama-3.1-70b": Shape(80, 8192, 28672, 64, 8, 128256),
    "tiny": Shape(2, 64, 128, 4, 2, 256),
}

_CONFIG = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}


def load_shape(name: str) -> Shape:
    """A shape by name, or from the config.json of a Hugging Face model. Raises ValueError."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(f"unknown shape {name!r}: give a model's config.json or one of {', '.join(SHAPES)}")
    config = next((row for _, row in records(path)), {})
    return Shape(**{own: count(config, theirs, str(path), least=1) for own, theirs in _CONFIG.items()})


# (prompt tokens, context before them, decoding sequences, context of each)
Step = tuple[int, int, int, int]


def grid(longest: int, batch: int, *, quick: bool = False) -> list[Step]:
    """Prompts up to `longest` tokens and decode batches up to `batch` sequences, growing by factors.

    quick: about a third of the steps, still all terms of the form.
    """
    thin = 2 if quick else 1
    lengths = [n for n in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= longest][::-thin][::-1]
    sizes = [b for b in (1, 4, 16, 64, 256) if b <= batch][::-thin][::-1]
    before = (0, 2 * longest) if quick else (0, longest // 2, 2 * longest)
    contexts = (longest // 8, longest) if quick else (longest // 8, longest // 2, longest)
    return [(n, p, 0, 0) for n in lengths for p in before] + [(0, 0, b, kv) for b in sizes for kv in contexts]


class Model:
    """One decoder on `device` ("cpu", "cuda", "cuda:1"), in bfloat16 on a GPU and float32 on a CPU.

    Raises ValueError for a device that is not there and for weights that do not fit into its memory.
    """

    def __init__(self, shape: Shape, device: str, seed: int = 0) -> None:
        try:
            import torch
        except ModuleNotFoundError:
            raise ValueError("measuring needs PyTorch: pip install 'kvist[calibrate]'") from None
        self.torch: Any = torch
        self.shape = shape
        try:
            self.device = torch.device(device)
            if self.device.type == "cuda" and not torch.cuda.is_available():
                raise RuntimeError("this PyTorch sees no CUDA GPU: use --device cpu, or a CUDA build")
            self.generator = torch.Generator(self.device).manual_seed(seed)
        except RuntimeError as error:
            raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self._check_memory()
        queries = shape.heads * shape.head
        keys = shape.kv_heads * shape.head
        self.layers = [
            (
                self._random(shape.hidden, queries + 2 * keys),
                self._random(queries, shape.hidden),
                self._random(shape.hidden, 2 * shape.intermediate),
                self._random(shape.intermediate, shape.hidden),
            )
            for _ in range(shape.layers)
        ]
        self.output = self._random(shape.hidden, shape.vocab)

    @property
    def name(self) -> str:
        """What the device calls itself."""
        on_gpu = self.device.type == "cuda"
        return str(self.torch.cuda.get_device_name(self.device)) if on_gpu else self.device.type.upper()

    def _check_memory(self) -> None:
        if self.device.type == "cuda":
            free = self.torch.cuda.mem_get_info(self.device)[0]
        elif self.device.type == "cpu":
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        else:
            return
        need = self.shape.weights * self.dtype.itemsize
        if need > free:
            raise ValueError(
                f"--shape: its weights take {need / _GIB:.1f} GiB, {self.device} has {free / _GIB:.1f} GiB: "
                "give a smaller shape, or a config.json with one GPU's share of a sharded model"
            )

    def _random(self, *size: int) -> Any:
        kwargs = {"device": self.device, "dtype": self.dtype, "generator": self.generator}
        return self.torch.randn(*size, **kwargs) * size[0] ** -0.5

    def step(self, tokens: int, cache: Any) -> Any:
        """`tokens` new tokens for each sequence of `cache`; the logits of each sequence's last token.

        cache: (layers, 2, sequences, kv_heads, context + tokens, head); the last `tokens` places are written.
        """
        from torch.nn.attention.bias import causal_lower_right

        shape, functional = self.shape, self.torch.nn.functional
        batch, total = cache.shape[2], cache.shape[4]
        hidden = self._random(batch, tokens, shape.hidden)
        keys = shape.kv_heads * shape.head
        # Aligned to the end of the context: flash attention knows this form, a mask of its own it does not.
        mask = causal_lower_right(tokens, total) if tokens > 1 else None
        for layer, (qkv, out, up, down) in enumerate(self.layers):
            normal = functional.rms_norm(hidden, (shape.hidden,))
            q, k, v = (normal @ qkv).split([shape.heads * shape.head, keys, keys], dim=-1)
            q = q.view(batch, tokens, shape.heads, shape.head).transpose(1, 2)
            for kind, new in ((0, k), (1, v)):
                new = new.view(batch, tokens, shape.kv_heads, shape.head).transpose(1, 2)
                cache[layer, kind, :, :, total - tokens :] = new
            attention = functional.scaled_dot_product_attention(
                q, cache[layer, 0], cache[layer, 1], attn_mask=mask, enable_gqa=True
            )
            hidden = hidden + attention.transpose(1, 2).reshape(batch, tokens, -1) @ out
            gate, value = (functional.rms_norm(hidden, (shape.hidden,)) @ up).chunk(2, dim=-1)
            hidden = hidden + (functional.silu(gate) * value) @ down
        return hidden[:, -1] @ self.output

    def time(self, step: Step) -> float:
        """Seconds of one step after a warm-up: the median on a GPU, the least on a CPU, which others use too.

        Raises MemoryError if it does not fit.
        """
        torch, shape = self.torch, self.shape
        tokens, before, decodes, context = step
        batch, new, total = (decodes, 1, context + 1) if decodes else (1, tokens, before + tokens)
        size = (shape.layers, 2, batch, shape.kv_heads, total, shape.head)
        try:
            with torch.inference_mode():
                cache = torch.zeros(size, device=self.device, dtype=self.dtype)
                for _ in range(WARM_UP):
                    self.step(new, cache)
                typical = min if self.device.type == "cpu" else median
                return typical([self._once(new, cache) for _ in range(REPEATS)])
        except torch.OutOfMemoryError:
            raise MemoryError(f"{batch} sequences of {total} tokens do not fit") from None

    def _once(self, tokens: int, cache: Any) -> float:
        """Seconds of one step; on a GPU by events on its stream, without the way there and back."""
        if self.device.type != "cuda":
            before = time.perf_counter()
            self.step(tokens, cache)
            return time.perf_counter() - before
        cuda = self.torch.cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda.synchronize(self.device)
        start.record()
        self.step(tokens, cache)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def measure(model: Model, steps: list[Step]) -> Iterator[dict[str, float]]:
    """Rows of a table of steps, in order; steps that do not fit in memory are left out."""
    for step in steps:
        tokens, before, decodes, context = step
        try:
            seconds = model.time(step)
        except MemoryError:
            continue
        yield {
            "latency_ms": seconds * 1e3,
            "prefill_tokens": tokens,
            "prefill_context": before,
            "decode_seqs": decodes,
            "decode_kv": decodes * (context + 1),
        }
