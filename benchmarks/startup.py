"""Time importing the package and constructing a model, and compare with upstream."""

from __future__ import annotations

import statistics
import subprocess
import sys
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
    report.end()
