"""Measure in a new process, so that nothing that happened before matters."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.device import KINDS, Device

Values = dict[str, float]


def alone(module: str, device: Device, *arguments: Any, env: Mapping[str, str] = {}) -> Values:
    """Return what `measure(device, *arguments)` of a benchmark returns in a new process."""
    call = json.dumps([module, device.kind, device.dtype_name, *arguments])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.alone", call]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
    values: Values = json.loads(done.stdout.splitlines()[-1])
    return values


def main(call: str) -> None:
    module, kind, dtype, *arguments = json.loads(call)
    measure = importlib.import_module(f"benchmarks.{module}").measure
    print(json.dumps(measure(KINDS[kind](dtype), *arguments)))


if __name__ == "__main__":
    main(sys.argv[1])
