"""Describe the machine and the releases that a table was measured with."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe(device: str, *packages: str) -> str:
    """Return one line with date, Python, releases, threads and `device`, to print under a table."""
    releases = ", ".join(_releases("torch", "x-transformers", *packages))
    threads = f"{torch.get_num_threads()} threads"
    return f"{date.today()}: Python {platform.python_version()}, {releases}, {threads}, {device}."


def _releases(*packages: str) -> Iterator[str]:
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            yield f"{package} {version(package)}"


def processor() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
