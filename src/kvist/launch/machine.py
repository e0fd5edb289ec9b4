"""What this machine has to offer: GPUs, free ports, a tokenizer's files."""

from __future__ import annotations

import errno
import importlib
import random
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

# Below those that systems give to outgoing connections: a port found free stays so until its server binds it.
QUIET_PORTS = range(20_000, 32_000)


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else what nvidia-smi lists; empty without NVIDIA GPUs."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [
        str(i) for i, _ in enumerate(line for line in told.stdout.splitlines() if line.startswith("GPU "))
    ]


def take_ports(host: str, first: int, count: int) -> list[int]:
    """`count` ports from `first` on, or any free ones for 0. Raises ValueError for one that is taken."""
    held: list[socket.socket] = []
    choice = range(first, first + count) if first else random.sample(QUIET_PORTS, len(QUIET_PORTS))
    try:
        for port in choice:
            if len(held) == count:
                break
            one = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((host, port))
            except (OSError, OverflowError) as error:
                one.close()
                reason = getattr(error, "strerror", None) or error
                if first or getattr(error, "errno", None) != errno.EADDRINUSE:
                    text = f"--worker-port {first}: {host}:{port}: {reason}: choose another"
                    raise ValueError(text) from None
            else:
                held.append(one)
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def tokenizer_folder(model: str) -> str:
    """Where the model's tokenizer.json is: its own folder, or the Hugging Face cache's; else empty."""
    if (Path(model) / "tokenizer.json").is_file():
        return model
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        return ""
    try:
        found = hub.try_to_load_from_cache(model, "tokenizer.json")
    except ValueError:  # not the name of a repository
        return ""
    return str(Path(found).parent) if isinstance(found, str) else ""
