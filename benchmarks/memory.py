"""Peak memory of one training step, each contestant alone in a process, above what the process held before."""

from __future__ import annotations

import resource
import subprocess
import sys

import torch

from benchmarks.peers import HAND_WIRED, HUGGING_FACE, OURS, losses, training_step
from benchmarks.report import Report
from palme_xt import PalmE, PalmEConfig

SHAPES = (4, 256), (2, 1024)
FLOOR = "floor: weights and gradients"


def peak() -> float:
    """The most memory that this process has held, in MB (Linux counts in units of 1024 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(name: str, b: int, n: int) -> float:
    """MB that a model and its second training step take at their peak."""
    config = PalmEConfig()
    losses(PalmEConfig(image_size=32, encoder_depth=1, decoder_depth=1, num_tokens=8), OURS)  # imports are not counted
    before = peak()
    module, loss = losses(config, name)[name]
    img, text = torch.randn(b, 3, config.image_size, config.image_size), torch.randint(config.num_tokens, (b, n))
    for _ in range(2):
        training_step(module, loss, img, text)()
    return peak() - before


def main() -> None:
    report = Report("memory", "Peak memory of a training step", "transformers")
    report.header("batch", "tokens", "contestant", "MB", "relative to hand-wired")
    weights = 2 * sum(parameter.nbytes for parameter in PalmE().parameters()) / 1e6
    for b, n in SHAPES:
        found = {}
        for name in HAND_WIRED, OURS, HUGGING_FACE:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", name, str(b), str(n)]
            found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        found[FLOOR] = weights
        for name, value in found.items():
            report.row(b, n, name, f"{value:.0f}", f"{value / found[HAND_WIRED]:.2f}")
    report.end()


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
