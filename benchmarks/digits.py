"""Train the default digits captioner, and the default model of questions about digits, from five seeds each.

It reports their accuracy and training time.
"""

from __future__ import annotations

import tempfile
import time
from itertools import product
from pathlib import Path

from benchmarks.report import Report
from palme_xt.captioner.options import DIGITS, STEPS, Data, Training, default_model
from palme_xt.captioner.tokenizer import ByteTokenizer
from palme_xt.captioner.training.loop import train
from palme_xt.captioner.training.run import Run

COLUMNS = ("task", "seed", "held-out exact match", "seconds")
SEEDS = range(5)


def main() -> None:
    report = Report("digits", "Digits captioner", COLUMNS, ["scikit-learn"])
    with tempfile.TemporaryDirectory() as folder:
        for (task, steps), seed in product(STEPS.items(), SEEDS):
            started = time.perf_counter()
            model, run = default_model(DIGITS, task), Run(Path(folder) / f"{task}-{seed}")
            outcome = train(model, Training(seed=seed, steps=steps), Data(task=task), ByteTokenizer(), run)
            exact_match = f"{outcome.evaluation.scores['held_out_exact_match']:.1%}"
            report.row(task, seed, exact_match, f"{time.perf_counter() - started:.0f}")
    report.end()
