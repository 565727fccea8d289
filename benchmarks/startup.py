"""Time importing the package, constructing a model and compiling its step, and compare with upstream."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.alone import Values, alone
from benchmarks.device import CPU, Device
from benchmarks.hand_wired import HandWired
from benchmarks.peers import HAND_WIRED, OURS
from benchmarks.report import Report, middle
from benchmarks.timing import medians
from palme_xt import PalmE, PalmEConfig

COLUMNS = ("what", "contestant", "seconds", "relative to upstream")
ROUNDS = 25  # half a second each, on a machine whose speed varies by a tenth
IMPORT = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
STATEMENTS = {"x_transformers": "import x_transformers", "palme_xt": "from palme_xt import PalmE"}


def measure(device: Device) -> Values:
    """Return the seconds to the first token of a compiled step.

    That is the third token: the first reads the prompt, and a length of 1 is not compiled.
    """
    model, img = device.place(PalmE()), device.place(torch.randn(1, 3, 256, 256))
    start = device.place(torch.zeros(1, 1, dtype=torch.long))
    return {OURS: device.seconds(lambda: model.generate(img, start, 3, temperature=0.0, compile=True))}


def import_seconds(package: str) -> float:
    """Return the time of the import alone in a new process, in seconds."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT.format(STATEMENTS[package])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(device: Device = CPU, runs: int = 1) -> None:
    report = Report("startup", "Import and construction", COLUMNS, device=device)
    if device.kind == "cpu":
        _import_and_build(report)
    found: dict[str, list[Values]] = {"empty": [], "full": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as cache:
            for values in found.values():
                values.append(alone("startup", device, env={"TORCHINDUCTOR_CACHE_DIR": cache}))
    for state, values in found.items():
        report.row(f"first token, `compile=True`, cache on disk {state}", OURS, f"{middle(values, OURS):.1f}", "-")
    report.end()


def _import_and_build(report: Report) -> None:
    times: dict[str, list[float]] = {package: [] for package in STATEMENTS}
    for _ in range(ROUNDS):
        for package, seconds in times.items():
            seconds.append(import_seconds(package))
            time.sleep(0.1)
    imported = {package: statistics.median(seconds) for package, seconds in times.items()}
    config = PalmEConfig()
    built = medians({HAND_WIRED: lambda: HandWired(config), OURS: lambda: PalmE.from_config(config)}, ROUNDS)
    for what, middles in ("import", imported), ("construction", built):
        upstream = next(iter(middles.values()))
        for name, value in middles.items():
            report.row(what, name, f"{value:.2f}", f"{value / upstream:.3f}")
