"""What the training loop costs beside the computation: `train`, with all that it does, against a bare loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import emoji
from benchmarks.report import Report
from palme_xt import PalmE
from palme_xt.captioner.data.batches import Share, load_batches
from palme_xt.captioner.data.rows import load_data
from palme_xt.captioner.images import Preprocessing
from palme_xt.captioner.options import PICTURES_MODEL, Data, Training
from palme_xt.captioner.tokenizer import ByteTokenizer
from palme_xt.captioner.training.loop import train
from palme_xt.captioner.training.run import Run

STEPS = 160  # five epochs, of which the first decodes the pictures
PICTURES = 1000
ROUNDS = 4
BLOCK = 10  # steps that each contestant does in turn
AHEAD = 3  # steps of each block that are not counted: their batches were read while the other had its turn
EPOCHS = {"five epochs": range(1, 16), "the first, which decodes": range(1, 3), "the others": range(4, 16)}  # in blocks
BARE, OURS = "bare loop: forward, backward, step on batches in memory", "`palme-xt train --log-with tensorboard`"


class TakingTurns(Run):
    """A run folder that times each step of the training that it is for, and after each block as many bare steps."""

    def __init__(self, folder: Path, bare_step: Callable[[int], None]) -> None:
        super().__init__(folder)
        self.bare_step = bare_step
        self.ours: list[float] = []
        self.bare: list[float] = []
        self._started = time.perf_counter()

    def log(self, **metrics: Any) -> None:
        super().log(**metrics)
        if "loss" not in metrics:
            return
        self.ours.append(time.perf_counter() - self._started)
        if len(self.ours) % BLOCK == 0:
            for number in range(len(self.bare), len(self.ours)):
                started = time.perf_counter()
                self.bare_step(number)
                self.bare.append(time.perf_counter() - started)
        self._started = time.perf_counter()


def bare_loop(batches: list[tuple[Tensor, Tensor]], training: Training) -> Callable[[int], None]:
    """A function that does the step of a number."""
    torch.manual_seed(training.seed)
    model = PalmE.from_config(PICTURES_MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True)

    def step(number: int) -> None:
        model(*batches[number]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def per_block(seconds: list[float]) -> list[float]:
    """Seconds of the counted steps of each block."""
    return [sum(seconds[start + AHEAD : start + BLOCK]) for start in range(0, STEPS, BLOCK)]


def main() -> None:
    report = Report("loop", f"The training loop: {PICTURES} pictures, batch 32", "accelerate", "datasets")
    report.header("epochs", "contestant", "images a second", "relative to the bare loop", "half of all blocks within")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = emoji.prepare(folder / "emoji")
        data = Data(str(folder / "emoji"), held_out=str(count - PICTURES))
        training = Training(
            steps=STEPS, lr=1e-3, eval_every=STEPS, eval_images=1, save_every=STEPS, log_with="tensorboard"
        )
        preprocessing = Preprocessing.like_clip(PICTURES_MODEL)
        source, _ = load_data(data, PICTURES_MODEL, preprocessing, ByteTokenizer(), seed=0, max_held_out=1)
        loaded = load_batches(source, range(STEPS), Share(training.batch_size), PICTURES_MODEL, 0)
        batches = [(preprocessing.normalise(batch.img), batch.text) for batch in loaded]
        ours, bare = [], []
        for number in range(ROUNDS):
            run = TakingTurns(folder / str(number), bare_loop(batches, training))
            train(PICTURES_MODEL, training, data, ByteTokenizer(), run)
            ours.append(per_block(run.ours))
            bare.append(per_block(run.bare))
    images = training.batch_size * (BLOCK - AHEAD)
    for epochs, blocks in EPOCHS.items():
        pairs = [(mine[block], other[block]) for mine, other in zip(ours, bare, strict=True) for block in blocks]
        ratios = sorted(other / mine for mine, other in pairs)
        low, middle, high = statistics.quantiles(ratios, n=4)
        speeds = [statistics.median(images / seconds for seconds in each) for each in zip(*pairs, strict=True)]
        report.row(epochs, BARE, f"{speeds[1]:.0f}", "1.000", "")
        report.row(epochs, OURS, f"{speeds[0]:.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    report.end()


if __name__ == "__main__":
    main()
