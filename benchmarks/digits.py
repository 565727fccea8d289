"""Does the shipped default learn, from any seed, in time? `palme-xt train` from five seeds."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe
from palme_xt.captioner.options import DIGITS_MODEL, Data, Training
from palme_xt.captioner.tokenizer import ByteTokenizer
from palme_xt.captioner.training.loop import train
from palme_xt.captioner.training.run import Run

SEEDS = range(5)


def main() -> None:
    print("## Digits captioner\n")
    print(describe("scikit-learn"), end="\n\n")
    print("| seed | held-out exact match | seconds |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            started = time.perf_counter()
            outcome = train(DIGITS_MODEL, Training(seed=seed), Data(), ByteTokenizer(), Run(Path(folder) / str(seed)))
            print(
                f"| {seed} | {outcome.evaluation.exact_match:.1%} | {time.perf_counter() - started:.0f} |", flush=True
            )
