"""Measure how the time of a training step grows with the text length and the batch, with plots and fitted exponents."""

from __future__ import annotations

import numpy as np

from benchmarks.peers import HAND_WIRED, HUGGING_FACE, OURS, build, draw_batch, training_steps
from benchmarks.report import Report
from benchmarks.timing import medians
from palme_xt import PalmEConfig

COLUMNS = ("of", "contestant", "from", "seconds", "to", "seconds there", "exponent")
# Two layers and a small vocabulary, so that the longest text and the largest batch fit in memory.
CONFIG = PalmEConfig(encoder_depth=2, decoder_depth=2, num_tokens=2000, max_seq_len=4096)
TOKENS = (128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16, 32)
ROUNDS = 1


def main() -> None:
    models = build(CONFIG, OURS, HAND_WIRED, HUGGING_FACE)
    report = Report("growth", "Growth of a training step: 2 + 2 layers, 2,000 tokens", COLUMNS, ["transformers"])
    for label, sizes in ("text length", TOKENS), ("batch", BATCHES):
        shapes = [(1, size) if label == "text length" else (size, 128) for size in sizes]
        found = [medians(training_steps(models, *draw_batch(CONFIG, b, n)), ROUNDS) for b, n in shapes]
        seconds = {name: [each[name] for each in found] for name in models}
        for name, values in seconds.items():
            exponent = np.polyfit(np.log(sizes), np.log(values), 1)[0]
            report.row(label, name, sizes[0], f"{values[0]:.3f}", sizes[-1], f"{values[-1]:.3f}", f"{exponent:.2f}")
        report.plot(f"Training step over {label}", label, sizes, seconds)
    report.end()
