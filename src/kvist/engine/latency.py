"""Latency profiles: how long one engine step takes on a given GPU with a given model.

    T[ms] = a + max(w, b * N) + c * sum_prefill n * (p + n / 2) + d * sum_decode KV + e * B

N: all new tokens in the step; n: tokens of a prefill chunk, p: the context before it; KV: context tokens of a
decoding sequence; B: decoding sequences. `a` is the fixed cost of a step, `w` the time to read the weights
once (a small batch is bound by memory), `b` the compute per token, `c` attention over a prompt, `d` reading
the KV cache, `e` bookkeeping per sequence. The form is a roofline with attention terms; see the `source` of
each profile for where its coefficients come from.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

import msgspec

GIB = 1 << 30
DEFAULT_PROFILE = "llama-3.1-8b-l40"


class LatencyProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One GPU (or tensor-parallel group) running one model. Units are in the field names.

    The KV capacity is `kv_tokens` where given, else what the memory leaves:
    (gpu_memory_gib * memory_utilization - activations_gib) * gpus - weights_gib, in tokens of
    kv_bytes_per_token. Raises ValueError for a negative coefficient or if no KV memory is left.
    """

    name: str
    model: str
    gpu: str
    source: str
    a_ms: float
    w_ms: float
    b_us_per_token: float
    c_ns_per_token_context: float
    d_us_per_1k_kv: float
    e_us_per_sequence: float
    gpus: int = 1
    kv_tokens: int | None = None
    kv_bytes_per_token: int = 0
    gpu_memory_gib: float = 0.0
    memory_utilization: float = 0.9
    weights_gib: float = 0.0
    activations_gib: float = 2.0
    fit_error: float | None = None  # mean absolute relative error against the table it was fitted to
    estimate: bool = False  # not measured: derived from another GPU

    def __post_init__(self) -> None:
        for field in COEFFICIENTS:
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be a number of at least 0, not {getattr(self, field)}")
        if self.a_ms + self.w_ms + self.b_us_per_token <= 0:
            raise ValueError("a_ms, w_ms and b_us_per_token are all 0: a step would take no time")
        if self.gpus < 1:
            raise ValueError(f"gpus must be at least 1, not {self.gpus}")
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise ValueError(f"kv_tokens must be at least 1, not {self.kv_tokens}")
        if self.kv_tokens is None and self.capacity < 1:
            raise ValueError(
                "no memory is left for the KV cache: give kv_tokens, or gpu_memory_gib, weights_gib and "
                "kv_bytes_per_token that leave some"
            )

    @property
    def capacity(self) -> int:
        """Tokens of KV cache."""
        if self.kv_tokens is not None:
            return self.kv_tokens
        if self.kv_bytes_per_token < 1:
            return 0
        usable = (self.gpu_memory_gib * self.memory_utilization - self.activations_gib) * self.gpus
        return int((usable - self.weights_gib) * GIB / self.kv_bytes_per_token)

    def step(self, tokens: int, prefill: float, decode_kv: int, decodes: int) -> float:
        """Seconds of one step: `tokens` new ones in all, `prefill` = sum of n * (p + n / 2) over prefill
        chunks, `decode_kv` context tokens over `decodes` decoding sequences."""
        compute = self.b_us_per_token * tokens * 1e-6
        weights = self.w_ms * 1e-3
        return (
            self.a_ms * 1e-3
            + (compute if compute > weights else weights)
            + self.c_ns_per_token_context * prefill * 1e-9
            + self.d_us_per_1k_kv * decode_kv * 1e-9
            + self.e_us_per_sequence * decodes * 1e-6
        )


COEFFICIENTS = (
    "a_ms",
    "w_ms",
    "b_us_per_token",
    "c_ns_per_token_context",
    "d_us_per_1k_kv",
    "e_us_per_sequence",
)


def profile_names() -> list[str]:
    """The profiles that ship with kvist."""
    folder = files("kvist.engine") / "profiles"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_profile(name: str | Path) -> LatencyProfile:
    """A shipped profile by name, or one from a TOML file by path.

    Raises ValueError naming the file and the field that does not fit.
    """
    text = str(name)
    if text in profile_names():
        return _parse(
            (files("kvist.engine") / "profiles" / f"{text}.toml").read_text("utf-8"), f"{text}.toml"
        )
    path = Path(text)
    if path.suffix != ".toml" and not path.is_file():
        raise ValueError(
            f"unknown latency profile {text!r}: give the path of a TOML file or one of "
            f"{', '.join(profile_names())}"
        )
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the latency profile: {error}") from None
    return _parse(content, str(path))


def _parse(content: str, file: str) -> LatencyProfile:
    try:
        return msgspec.convert(tomllib.loads(content), LatencyProfile)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: not valid TOML: {error}") from None
    except (msgspec.ValidationError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def to_toml(profile: LatencyProfile) -> str:
    """The profile as a TOML file that `load_profile` reads."""
    lines = []
    for name, value in msgspec.structs.asdict(profile).items():
        if value is not None:
            lines.append(f"{name} = {msgspec.json.encode(value).decode()}")  # a TOML scalar, too
    return "\n".join(lines) + "\n"
