"""What to start: command line and environment of each engine and of the gateway. Starts nothing itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvist.cache import EVICTIONS
from kvist.plugins import EVICTION, SEED

# What starts an engine where kvist is installed, what it calls the model, tensor parallelism, and the options
# that kvist sets itself (an engine takes the last of two, so a second one would go unnoticed).
MODULES = {"vllm": "vllm.entrypoints.cli.main", "sglang": "sglang.launch_server"}
PARALLEL = {"vllm": "--tensor-parallel-size", "sglang": "--tp-size"}
OWN = {
    "--host": "kvist keeps engines on --worker-host",
    "--port": "give --worker-port",
    "--kv-events-config": "kvist sets it for each replica",
    "--model": "give --model",
    "--model-path": "give --model",
    "--data-parallel-size": "give --replicas",
    "-dp": "give --replicas",
    "--dp-size": "give --replicas",
    "--tensor-parallel-size": "give --tensor-parallel-size before the --",
    "-tp": "give --tensor-parallel-size before the --",
    "--tp-size": "give --tensor-parallel-size before the --",
    "--tp": "give --tensor-parallel-size before the --",
}
PLUGIN_LISTS = {"vllm": "VLLM_PLUGINS", "sglang": "SGLANG_PLUGINS"}


@dataclass(frozen=True)
class Command:
    """A process to start. `environ` is added to the parent's."""

    name: str
    argv: list[str]
    url: str
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    engines: list[Command]
    gateway: Command


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the operator asked for. events: a folder for the sockets of KV events, private to this user."""

    engine: str
    model: str
    replicas: int
    events: Path
    eviction: str = ""
    policy: str = "lbgr"
    host: str = "127.0.0.1"
    port: int = 8000
    worker_host: str = "127.0.0.1"
    worker_ports: Sequence[int] = ()
    tensor_parallel_size: int = 1
    gpus: Sequence[str] = ()  # empty: leave the devices alone
    tokenizer: str = ""
    serve_config: str = ""
    engine_command: Sequence[str] = ()
    extra: Sequence[str] = ()
    seed: int = 0


def make_plan(wanted: Wanted, environ: Mapping[str, str]) -> Plan:
    """Raises ValueError naming the option that cannot work."""
    if wanted.engine not in MODULES:
        raise ValueError(f"--engine {wanted.engine}: choose one of {', '.join(MODULES)}")
    for word in wanted.extra:
        if (option := word.split("=")[0]) in OWN:
            raise ValueError(f"{option} behind -- is not yours to give: {OWN[option]}")
    shares = share_gpus(wanted.gpus, wanted.replicas, wanted.tensor_parallel_size)
    launcher = list(wanted.engine_command) or [sys.executable, "-m", MODULES[wanted.engine]]
    if not wanted.engine_command and importlib.util.find_spec(wanted.engine) is None:
        raise ValueError(
            f"--engine {wanted.engine}: {wanted.engine} is not installed beside kvist ({sys.executable}): "
            f"pip install {wanted.engine}, or say what starts it with --engine-command"
        )
    engines = []
    for i in range(wanted.replicas):
        port = wanted.worker_ports[i]
        share = {"CUDA_VISIBLE_DEVICES": shares[i]} if shares else {}
        engines.append(
            Command(
                f"{wanted.engine}-{i}",
                [*launcher, *_arguments(wanted, i, port), *wanted.extra],
                f"http://{wanted.worker_host}:{port}",
                {**_plugin(wanted, i, environ), **share},
            )
        )
    return Plan(engines, _gateway(wanted, [engine.url for engine in engines]))


def share_gpus(gpus: Sequence[str], replicas: int, each: int) -> list[str]:
    """Consecutive devices for each replica. Raises ValueError if there are too few."""
    if not gpus:
        return []
    if replicas * each > len(gpus):
        raise ValueError(
            f"--replicas {replicas} with --tensor-parallel-size {each} needs {replicas * each} GPUs, "
            f"and there are {len(gpus)} ({','.join(gpus)}): lower one of the two, or name more with --gpus"
        )
    return [",".join(gpus[i * each : (i + 1) * each]) for i in range(replicas)]


def sockets(wanted: Wanted, replica: int) -> tuple[str, str]:
    """ZeroMQ addresses of a replica's KV events and of their replay.

    Unix sockets, not TCP ports: events carry the token ids of all prompts.
    """
    return tuple(f"ipc://{wanted.events}/{replica}.{kind}" for kind in ("events", "replay"))  # type: ignore[return-value]


def _arguments(wanted: Wanted, replica: int, port: int) -> list[str]:
    live, replay = sockets(wanted, replica)
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "topic": "kv-events",
        "endpoint": live,
        "replay_endpoint": replay,
    }
    if wanted.engine == "vllm":
        words = ["serve", wanted.model, "--enable-prompt-tokens-details"]
    else:
        del events["enable_kv_cache_events"]
        words = ["--model-path", wanted.model, "--enable-cache-report"]
    words += ["--host", wanted.worker_host, "--port", str(port), "--kv-events-config", json.dumps(events)]
    if wanted.tensor_parallel_size > 1:
        words += [PARALLEL[wanted.engine], str(wanted.tensor_parallel_size)]
    return words


def _plugin(wanted: Wanted, replica: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Switch the engine's eviction over; without --eviction what the environment says stays."""
    if not wanted.eviction:
        return {}
    name = wanted.eviction.split(",")[0]
    online = [known for known in EVICTIONS if known != "belady"]
    if name not in online:
        raise ValueError(f"--eviction {name}: choose one of {', '.join(online)}")
    found = {EVICTION: wanted.eviction, SEED: str(wanted.seed + replica)}
    allowed = PLUGIN_LISTS[wanted.engine]
    if allowed in environ and "kvist" not in environ[allowed].split(","):
        found[allowed] = ",".join(filter(None, [environ[allowed], "kvist"]))
    return found


def _gateway(wanted: Wanted, urls: list[str]) -> Command:
    words = [sys.executable, "-m", "kvist", "serve"]
    words += ["--host", wanted.host, "--port", str(wanted.port), "--policy", wanted.policy]
    words += ["--seed", str(wanted.seed)]
    if wanted.serve_config:
        words += ["--config", wanted.serve_config]
    for url in urls:
        words += ["--worker-urls", url]
    if wanted.tokenizer:
        words += ["--tokenizer", wanted.tokenizer]
        for i in range(len(urls)):
            live, replay = sockets(wanted, i)
            words += ["--kv-events", live, "--kv-events-replay", replay]
    host = "127.0.0.1" if wanted.host in ("0.0.0.0", "") else wanted.host
    return Command("gateway", words, f"http://{host}:{wanted.port}")
