"""Measure the peak memory of a training step, with each contestant in its own process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.peers import HAND_WIRED, HUGGING_FACE, OURS, build, draw_batch, installed, training_steps
from benchmarks.report import Report, ratio
from palme_xt import PalmE, PalmEConfig

COLUMNS = ("batch", "tokens", "contestant", "MB", "relative to Hugging Face", "relative to hand-wired")
SHAPES = (4, 256), (2, 1024)
FLOOR = "floor: weights and gradients"


def peak() -> float:
    """Return the peak memory of this process, in MB, on Linux, which counts in units of 1024 bytes.

    `getrusage` would include the process that started this one, which other benchmarks may have made large.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def measure(name: str, b: int, n: int) -> float:
    """Return the peak memory of a model and its second training step, in MB."""
    config = PalmEConfig()
    build(PalmEConfig(image_size=32, encoder_depth=1, decoder_depth=1, num_tokens=8), OURS)  # imports are not counted
    before = peak()
    (step,) = training_steps(build(config, name), *draw_batch(config, b, n)).values()
    for _ in range(2):
        step()
    return peak() - before


def main() -> None:
    names = installed(OURS, HAND_WIRED, HUGGING_FACE)
    weights = 2 * sum(parameter.nbytes for parameter in PalmE().parameters()) / 1e6
    report = Report("memory", "Peak memory of a training step", COLUMNS, ["transformers"])
    for b, n in SHAPES:
        found = {}
        for name in names:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", name, str(b), str(n)]
            found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        found[FLOOR] = weights
        for name, value in found.items():
            against = ratio(value, found.get(HUGGING_FACE)), ratio(value, found[HAND_WIRED])
            report.row(b, n, name, f"{value:.0f}", *against)
    report.end()


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
