"""Where the numbers were measured."""

from __future__ import annotations

import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import torch


def describe(*packages: str) -> str:
    """One line with versions, threads and processor, to stand above each table."""
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("torch", "x-transformers", *packages) if _installed(package)
    )
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{date.today()}: Python {platform.python_version()}, {versions}, {torch.get_num_threads()} threads, {cpu}"


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.readlines()
    except OSError:
        return []
