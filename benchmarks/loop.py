"""What the training loop costs beside the computation: `train`, with all that it does, against a bare loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import emoji
from benchmarks.report import Report
from palme_xt import PalmE
from palme_xt.batches import Share, load_batches
from palme_xt.data import Data, load_data
from palme_xt.preprocessing import Preprocessing
from palme_xt.run import Run
from palme_xt.tokenizer import ByteTokenizer
from palme_xt.training import PICTURES_MODEL, Training, train

STEPS = 160  # five epochs, of which the first decodes the pictures
FIRST_EPOCH = 31
PICTURES = 1000
BURN_IN = 10
ROUNDS = 5
BARE, OURS = "bare loop: forward, backward, step on batches in memory", "`palme-xt train --log-with tensorboard`"


Contestant = Callable[[], list[float]]


class Clock(Run):
    """A run folder that notes when each step was logged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.times: list[float] = []

    def log(self, **metrics: Any) -> None:
        super().log(**metrics)
        if "loss" in metrics:
            self.times.append(time.perf_counter())


def bare(batches: list[tuple[Tensor, Tensor]], training: Training) -> list[float]:
    """Seconds of each step."""
    torch.manual_seed(training.seed)
    model = PalmE.from_config(PICTURES_MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True)
    times = []
    for img, text in batches:
        model(img, text).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    return times


def main() -> None:
    report = Report("loop", f"The training loop: {PICTURES} pictures, batch 32", "accelerate", "datasets")
    report.header("contestant", "images a second", "relative to the bare loop")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = emoji.prepare(folder / "emoji")
        data = Data(str(folder / "emoji"), held_out=str(count - PICTURES))
        training = Training(
            steps=STEPS, lr=1e-3, eval_every=STEPS, eval_images=1, save_every=STEPS, log_with="tensorboard"
        )
        preprocessing = Preprocessing.for_pictures(PICTURES_MODEL)
        source, _ = load_data(data, PICTURES_MODEL, preprocessing, ByteTokenizer(), seed=0, held_out=1)
        loaded = load_batches(source, range(STEPS), Share(training.batch_size), PICTURES_MODEL, 0)
        batches = [(preprocessing.normalise(batch.img), batch.text) for batch in loaded]
        times: dict[str, list[list[float]]] = {BARE: [], OURS: []}
        for number in range(ROUNDS + 1):
            run = Clock(folder / str(number))

            def ours(run: Clock = run) -> list[float]:
                train(PICTURES_MODEL, training, data, ByteTokenizer(), run)
                return run.times

            turns: dict[str, Contestant] = {BARE: partial(bare, batches, training), OURS: ours}
            for contestant in sorted(turns, reverse=bool(number % 2)):
                measured = turns[contestant]()
                if number:  # the first round warms up
                    times[contestant].append(measured)
    for what, last in ("all five epochs", STEPS), ("the rest of the first epoch", FIRST_EPOCH):
        speeds = {
            contestant: [
                training.batch_size * (last - BURN_IN) / (each[last - 1] - each[BURN_IN - 1]) for each in found
            ]
            for contestant, found in times.items()
        }
        for contestant, values in speeds.items():
            ratios = sorted(value / other for value, other in zip(values, speeds[BARE], strict=True))
            relative = f"{statistics.median(ratios):.3f}"
            if contestant != BARE:
                relative += f" ({ratios[0]:.3f} to {ratios[-1]:.3f} in {ROUNDS} rounds)"
            report.row(f"{contestant}, {what}", f"{statistics.median(values):.0f}", relative)
    report.end()


if __name__ == "__main__":
    main()
