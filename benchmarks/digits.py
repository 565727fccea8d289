"""Train the default digits captioner from five seeds, and report its accuracy and training time."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.report import Report
from palme_xt.captioner.options import DIGITS_MODEL, Data, Training
from palme_xt.captioner.tokenizer import ByteTokenizer
from palme_xt.captioner.training.loop import train
from palme_xt.captioner.training.run import Run

COLUMNS = ("seed", "held-out exact match", "seconds")
SEEDS = range(5)


def main() -> None:
    report = Report("digits", "Digits captioner", COLUMNS, ["scikit-learn"])
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            started = time.perf_counter()
            outcome = train(DIGITS_MODEL, Training(seed=seed), Data(), ByteTokenizer(), Run(Path(folder) / str(seed)))
            report.row(
                seed, f"{outcome.evaluation.scores['held_out_exact_match']:.1%}", f"{time.perf_counter() - started:.0f}"
            )
    report.end()
