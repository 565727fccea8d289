"""Collate examples into batches, the same global batches for any number of processes, workers and interruptions."""

import math
import multiprocessing
import os
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from palme_xt.captioner.data.augment import varied
from palme_xt.captioner.signals import ignore_interrupts_until
from palme_xt.captioner.turns import Text
from palme_xt.config import PalmEConfig


@dataclass(frozen=True)
class Example:
    """A captioned image, or images with questions and answers.

    Attributes:
        imgs: The images `(m, c, h, w)` in order, uint8 or float32 in 0..1. There may be none.
        name: The name of the row.
        answers: All captions of the image, or the answer to the last question.
        usable: The text of each caption that the model can learn, or the text of the questions with their answers.
        turn: Which of the usable texts is this example's; counted on from the first one again after the last.
    """

    imgs: Tensor
    name: str
    answers: list[str]
    usable: list[Text]
    turn: int = 0

    @property
    def text(self) -> Text:
        """The text whose turn it is."""
        return self.usable[self.turn % len(self.usable)]

    @property
    def prompt(self) -> Tensor:
        """The token ids `(t,)` that an answer is generated from: what comes before the last learned tokens."""
        ids, learned = self.text
        return torch.tensor(ids[: len(ids) - learned[::-1].index(False)])


class Defect(NamedTuple):
    """Why a row is unusable: the kind of defect in a few words, the details, and the name of the row."""

    reason: str
    detail: str
    name: str


class DataError(ValueError):
    """Raised if data cannot be loaded, or, with `strict`, if a row is unusable."""


class Source(Protocol):
    """An endless sequence of numbered rows, epoch after epoch, in a reproducible order.

    Attributes:
        rows_per_epoch: Number of rows in an epoch; infinite until the first epoch has ended.
        augment_seed: If it is not None, `read` varies each image. The variation depends only on this seed and the
            number of the row, which counts over all epochs. It is therefore a new one in each epoch, and the same for
            any number of processes and workers and in a resumed run.
    """

    rows_per_epoch: float = math.inf
    augment_seed: int | None = None

    def row(self, number: int) -> Example | Defect:
        """Return the row with this number, which must not decrease from one call to the next."""

    def read(self, numbers: range) -> list[Example | Defect]:
        """Return the rows with these numbers."""
        rows = {number: self.row(number) for number in numbers}
        for number, row in rows.items():
            if self.augment_seed is not None and isinstance(row, Example):
                draw = random.Random(f"{self.augment_seed} {number}")
                images = [varied(img, draw)[None] for img in row.imgs]
                rows[number] = replace(row, imgs=torch.cat([row.imgs[:0], *images]))  # there may be none
        return [*rows.values()]

    def fingerprint(self) -> str:
        """Return a digest of the data, which a resumed run compares, or '' if there is none."""
        return ""


def positions(ids: Sequence[int], config: PalmEConfig) -> int:
    """Return how many positions a text takes: an image inside takes as many as the ViT has patches."""
    return len(ids) + ids.count(config.image_token) * ((config.image_size // config.patch_size) ** 2 - 1)


@dataclass(frozen=True)
class Batch:
    """The rows that one process computes at once.

    Attributes:
        img: The images of all rows, one after another, `(sum of counts, c, h, w)`, uint8 or float32 in 0..1, not
            normalised. A batch without usable rows has one blank image, which does not count.
        counts: Number of images of each row.
        text: Token ids `(b, n)`, int64, with `ignore_index` after EOS.
        target_mask: `(b, n)`, bool, True at the tokens to learn.
        prompts: The token ids `(t_i,)` of each row that its answer is generated from.
        targets: Number of tokens to learn; 0 without usable rows.
        references: All right answers of each row.
        names: The names of the rows.
        defects: The defects of the rows that were left out.
        rows: Number of rows that were read for the first time.
        new_defects: Number of defects among these rows; they come first in `defects`.
    """

    img: Tensor
    counts: list[int]
    text: Tensor
    target_mask: Tensor
    prompts: list[Tensor]
    targets: int
    references: list[list[str]]
    names: list[str]
    defects: list[Defect]
    rows: int
    new_defects: int


class _Batches(Dataset["Batch | DataError"]):
    """The batches of a source, by index.

    Unusable rows are left out, not replaced: the rows of a batch depend only on its index, so that no process and no
    resumed run has to read the rows before them.
    """

    def __init__(self, source: Source, numbers: Callable[[int], range], config: PalmEConfig) -> None:
        self.source, self.numbers, self.config = source, numbers, config

    def __getitem__(self, index: int) -> Batch | DataError:
        try:
            return self._batch(self.numbers(index))
        except DataError as error:
            return error  # returned, because an error raised in a worker would arrive as a traceback

    def _batch(self, numbers: range) -> Batch:
        rows = self.source.read(numbers)
        new = sum(number < self.source.rows_per_epoch for number in numbers)
        examples = [row for row in rows if isinstance(row, Example)]
        size, channels = self.config.image_size, self.config.channels
        blank = Text([self.config.image_token or 0, 0], [False, True])
        shown = examples or [Example(torch.zeros(1, channels, size, size), "blank", [""], [blank])]
        parts = zip(*(example.text for example in shown), strict=True)
        ids, learned = ([torch.tensor(values) for values in part] for part in parts)
        return Batch(
            img=torch.cat([example.imgs for example in shown]),
            counts=[len(example.imgs) for example in shown],
            text=pad_sequence(ids, batch_first=True, padding_value=self.config.ignore_index),
            target_mask=pad_sequence(learned, batch_first=True),
            prompts=[example.prompt for example in shown],
            targets=sum(sum(example.text.learned) for example in examples),
            references=[example.answers for example in examples],
            names=[example.name for example in examples],
            defects=[row for row in rows if isinstance(row, Defect)],
            rows=new,
            new_defects=sum(isinstance(row, Defect) for row in rows[:new]),
        )


@dataclass(frozen=True)
class Share:
    """The rows of each global batch that one process computes, as `count` micro-batches one after another.

    Args:
        batch_size: Number of rows in a global batch; divisible by `processes * count`.
        count: Number of micro-batches over which gradients are accumulated.
        process: Index of this process.
        processes: Number of processes.
    """

    batch_size: int
    count: int = 1
    process: int = 0
    processes: int = 1

    def __call__(self, index: int) -> range:
        """Return the numbers of the rows in a micro-batch of this process, whose index counts over all steps."""
        step, part = divmod(index, self.count)
        size = self.batch_size // (self.processes * self.count)
        start = ((step * self.processes + self.process) * self.count + part) * size
        return range(start, start + size)


def load_batches(
    source: Source, indices: range, numbers: Callable[[int], range], config: PalmEConfig, num_workers: int
) -> Generator[Batch, None, None]:
    """Yield batches in order. They are read ahead by `num_workers` processes, or by this process if that is 0.

    Close the generator if an error leaves it unfinished: until then, its workers ignore the SIGTERM with which Python
    ends them.

    Args:
        source: The rows.
        indices: The indices of the batches.
        numbers: A function that returns the numbers of the rows in a batch, given its index.
        config: The config of the model, for the shape of a blank image and `ignore_index`.
        num_workers: Number of processes that read ahead.

    Raises:
        DataError: If the source cannot be read.
    """
    done = multiprocessing.RawValue("b", False)
    loader = DataLoader(
        _Batches(source, numbers, config),
        batch_size=None,
        sampler=indices,
        num_workers=min(num_workers, len(indices)),
        generator=torch.Generator(),  # for the seeds of workers, which by default come from the generator of dropout
        worker_init_fn=partial(_start_worker, done),
    )
    try:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        done.value = True


def _start_worker(done: Any, worker: int) -> None:
    ignore_interrupts_until(done)
    if hasattr(os, "nice"):
        os.nice(10)  # with few cores, workers only use those that the computation leaves free
