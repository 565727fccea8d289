"""Time importing the package, constructing a model and compiling its step, and compare with upstream."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.hand_wired import HandWired
from benchmarks.peers import HAND_WIRED, OURS
from benchmarks.report import Report
from benchmarks.timing import medians
from palme_xt import PalmE, PalmEConfig

COLUMNS = ("what", "contestant", "seconds", "relative to upstream")
ROUNDS = 25  # half a second each, on a machine whose speed varies by a tenth
IMPORT = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
STATEMENTS = {"x_transformers": "import x_transformers", "palme_xt": "from palme_xt import PalmE"}

# The step is compiled for the third token: the first reads the prompt, and a length of 1 is not compiled.
COMPILE = """
import time, torch
from palme_xt import PalmE
model, img, start = PalmE(), torch.randn(1, 3, 256, 256), torch.zeros(1, 1, dtype=torch.long)
t = time.perf_counter()
model.generate(img, start, 3, temperature=0.0, compile=True)
print(time.perf_counter() - t)
"""


def compile_seconds(cache: str) -> float:
    """Return the time to the first compiled token in a new process, in seconds, with a folder for torch's cache."""
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def import_seconds(package: str) -> float:
    """Return the time of the import alone in a new process, in seconds."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT.format(STATEMENTS[package])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    report = Report("startup", "Import and construction", COLUMNS)
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
        for name, middle in middles.items():
            report.row(what, name, f"{middle:.2f}", f"{middle / upstream:.3f}")
    with tempfile.TemporaryDirectory() as cache:
        for state in "empty", "full":
            report.row(
                f"first token, `compile=True`, cache on disk {state}", OURS, f"{compile_seconds(cache):.1f}", "-"
            )
    report.end()
