# SPDX-License-Identifier: Apache-2.0
"""How benchmarks name their machine and publish their tables."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch


def machine(*packages: str) -> str:
    """Where this runs: GPU, processor, cores, versions of Python, torch and other packages."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    cpu = names[0].split(":")[1].strip() if names else platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    software = ", ".join(f"{n} {version(n)}" for n in ("torch", *packages))
    cores = len(os.sched_getaffinity(0))
    return f"{gpu}; {cpu}, {cores} cores; Python {platform.python_version()}, {software}"


def command(script: str, arguments: Sequence[str] | None = None) -> str:
    """How a benchmark was called, but for where its results went, in Markdown.

    Args:
        script: Its file.
        arguments: Of the command line, if not the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return f"`{' '.join(['python', f'benchmarks/{Path(script).name}', *words])}`"


def publish(lines: Sequence[str], out: Path | None) -> None:
    """Print a Markdown document, and write it if a file is given."""
    text = "\n".join([*lines, ""])
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
