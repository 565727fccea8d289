"""How a training step grows with the length of the text and with the batch: a plot, and a fitted exponent."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.peers import HAND_WIRED, HUGGING_FACE, OURS, losses, training_step
from benchmarks.report import Report
from benchmarks.timing import medians
from palme_xt import PalmEConfig

# Two layers and a small vocabulary, so that the longest and largest fit in memory, upstream's copies included.
CONFIG = PalmEConfig(encoder_depth=2, decoder_depth=2, num_tokens=2000, max_seq_len=4096)
TOKENS = (128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16, 32)
ROUNDS = 1


def main() -> None:
    contestants = losses(CONFIG, OURS, HAND_WIRED, HUGGING_FACE)
    report = Report("growth", "Growth of a training step: 2 + 2 layers, 2,000 tokens", "transformers")
    report.header("of", "contestant", "from", "seconds", "to", "seconds there", "exponent")
    for label, sizes in ("text length", TOKENS), ("batch", BATCHES):
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for size in sizes:
            b, n = (1, size) if label == "text length" else (size, 128)
            img, text = torch.randn(b, 3, 256, 256), torch.randint(CONFIG.num_tokens, (b, n))
            steps = {name: training_step(module, loss, img, text) for name, (module, loss) in contestants.items()}
            for name, value in medians(steps, ROUNDS).items():
                seconds[name].append(value)
        for name, values in seconds.items():
            exponent = np.polyfit(np.log(sizes), np.log(values), 1)[0]
            report.row(label, name, sizes[0], f"{values[0]:.3f}", sizes[-1], f"{values[-1]:.3f}", f"{exponent:.2f}")
        report.plot(f"Training step over {label}", label, sizes, seconds)
    report.end()
