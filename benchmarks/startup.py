"""What importing the package and constructing a model cost, against upstream's own."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.hand_wired import HandWired
from benchmarks.peers import HAND_WIRED, OURS
from benchmarks.report import Report
from benchmarks.timing import medians
from palme_xt import PalmE, PalmEConfig

ROUNDS = 9
IMPORT = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
STATEMENTS = {"x_transformers": "import x_transformers", "palme_xt": "from palme_xt import PalmE"}


def imported(package: str) -> float:
    """Seconds of the import alone, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT.format(STATEMENTS[package])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    config = PalmEConfig()
    report = Report("startup", "Import and construction")
    report.header("what", "contestant", "seconds", "relative to upstream")
    times: dict[str, list[float]] = {"x_transformers": [], "palme_xt": []}
    for _ in range(ROUNDS):
        for package, seconds in times.items():
            seconds.append(imported(package))
            time.sleep(0.1)
    middles = {package: sorted(seconds)[ROUNDS // 2] for package, seconds in times.items()}
    for package, middle in middles.items():
        report.row("import", package, f"{middle:.2f}", f"{middle / middles['x_transformers']:.3f}")
    built = medians({HAND_WIRED: lambda: HandWired(config), OURS: lambda: PalmE.from_config(config)}, ROUNDS)
    for name, middle in built.items():
        report.row("construction", name, f"{middle:.2f}", f"{middle / built[HAND_WIRED]:.3f}")
    report.end()
