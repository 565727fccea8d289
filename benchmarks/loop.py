"""Measure the overhead of the training loop: compare `train`, with everything that it does, with a bare loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

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

COLUMNS = ("epochs", "contestant", "images per second", "relative to the bare loop", "half of all blocks within")
STEPS = 160  # five epochs, of which the first decodes the images
IMAGES = 1000
ROUNDS = 4
BLOCK = 10  # steps per turn of each contestant
AHEAD = 3  # uncounted steps per block: their batches were read during the turn of the other loop
EPOCHS = {"five epochs": range(1, 16), "the first, which decodes": range(1, 3), "the others": range(4, 16)}  # in blocks
BARE, OURS = "bare loop: forward, backward, step on batches in memory", "`palme-xt train --log_with tensorboard`"
TRAINING = Training(steps=STEPS, lr=1e-3, eval_every=STEPS, eval_images=1, save_every=STEPS, log_with="tensorboard")


class TakingTurns:
    """Time the steps of a training run and, after each block of them, as many steps of a bare loop.

    `after_step` must be called after each optimizer step, including those of the bare loop.
    """

    def __init__(self, bare_step: Callable[[int], None]) -> None:
        self.bare_step = bare_step
        self.ours: list[float] = []
        self.bare: list[float] = []
        self._bare_has_its_turn = False
        self._started = time.perf_counter()

    def after_step(self, *_: object) -> None:
        if self._bare_has_its_turn:
            return
        self.ours.append(time.perf_counter() - self._started)
        if len(self.ours) % BLOCK == 0:
            self._bare_has_its_turn = True
            for number in range(len(self.bare), len(self.ours)):
                started = time.perf_counter()
                self.bare_step(number)
                self.bare.append(time.perf_counter() - started)
            self._bare_has_its_turn = False
        self._started = time.perf_counter()


def bare_loop(batches: list[tuple[Tensor, Tensor]]) -> Callable[[int], None]:
    """Return a function that does the step with the given number."""
    torch.manual_seed(TRAINING.seed)
    model = PalmE.from_config(PICTURES_MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING.lr, weight_decay=TRAINING.weight_decay, fused=True)

    def step(number: int) -> None:
        model(*batches[number]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def load_all(data: Data) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of all steps of the training run."""
    preprocessing = Preprocessing.like_clip(PICTURES_MODEL)
    source, _ = load_data(data, PICTURES_MODEL, preprocessing, ByteTokenizer(), seed=TRAINING.seed, max_held_out=1)
    batches = load_batches(source, range(STEPS), Share(TRAINING.batch_size), PICTURES_MODEL, 0)
    return [(preprocessing.normalise(batch.img), batch.text) for batch in batches]


def per_block(seconds: list[float]) -> list[float]:
    """Return the seconds of the counted steps of each block."""
    return [sum(seconds[start + AHEAD : start + BLOCK]) for start in range(0, STEPS, BLOCK)]


def measure(folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Return the seconds per block of the training loop and of the bare loop, for each round."""
    count = len(emoji.prepare(folder / "emoji"))
    data = Data(str(folder / "emoji"), held_out=str(count - IMAGES))
    batches = load_all(data)
    ours, bare = [], []
    for number in range(ROUNDS):
        turns = TakingTurns(bare_loop(batches))
        with register_optimizer_step_post_hook(turns.after_step):
            train(PICTURES_MODEL, TRAINING, data, ByteTokenizer(), Run(folder / str(number)))
        ours.append(per_block(turns.ours))
        bare.append(per_block(turns.bare))
    return ours, bare


def main() -> None:
    report = Report("loop", f"The training loop: {IMAGES} images, batch 32", COLUMNS, ["accelerate", "datasets"])
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = measure(Path(folder))
    images = TRAINING.batch_size * (BLOCK - AHEAD)
    for epochs, blocks in EPOCHS.items():
        pairs = [(mine[block], other[block]) for mine, other in zip(ours, bare, strict=True) for block in blocks]
        low, middle, high = statistics.quantiles([other / mine for mine, other in pairs], n=4)
        speeds = [statistics.median(images / seconds for seconds in each) for each in zip(*pairs, strict=True)]
        report.row(epochs, BARE, f"{speeds[1]:.0f}", "1.000", "")
        report.row(epochs, OURS, f"{speeds[0]:.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    report.end()
