"""Examples to batches: the same global batches whatever the number of processes, workers and interruptions."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from palme_xt.captioner.signals import ignore_interrupts_until
from palme_xt.config import PalmEConfig


@dataclass(frozen=True)
class Example:
    """A picture `(c, h, w)`, uint8, or float32 in 0..1; its caption, and that as token ids with BOS and EOS."""

    img: Tensor
    caption: str
    ids: list[int]
    name: str


@dataclass(frozen=True)
class Defect:
    """A row that cannot be learned from, the reason in a few words, and what exactly is wrong."""

    reason: str
    detail: str
    name: str


class DataError(ValueError):
    """Data that cannot be loaded, or rows that cannot be learned from under `strict`."""


class Source(Protocol):
    """An endless sequence of numbered rows, one epoch after another, in an order that is always the same."""

    def read(self, numbers: range) -> list[Example | Defect]:
        """The rows of these numbers; `numbers` never go back from one call to the next."""

    def first_epoch(self, numbers: range) -> int:
        """How many of these rows have not been there before."""

    def fingerprint(self) -> str:
        """What tells these rows from others: a resumed training compares it; '' where only reading all would tell."""


@dataclass(frozen=True)
class Batch:
    """What one process computes at once.

    Attributes:
        img: `(b, c, h, w)`, as its examples, not normalised. Where no row was usable it holds one blank picture, which
            counts for nothing.
        text: `(b, n)`, int64, `ignore_index` after EOS.
        targets: how many tokens are predicted; 0 where no row was usable.
        captions, names: of the b pictures.
        defects: rows that are not in it.
        rows: how many rows were read that had not been read before.
        new_defects: how many of the first `defects` are among them.
    """

    img: Tensor
    text: Tensor
    targets: int
    captions: list[str]
    names: list[str]
    defects: list[Defect]
    rows: int
    new_defects: int


class Batches(IterableDataset["Batch | DataError"]):
    """Batches of a source, dealt out to the workers of a `DataLoader` in turn, which keeps their order.

    Rows that cannot be learned from are left out, not replaced: which rows a batch holds depends on nothing but their
    numbers, so that every process, and a run that goes on, can tell them without reading what came before.

    Args:
        source: of the rows.
        indices: of the batches.
        numbers: the rows of the batch of an index.
        config: gives the shape of a blank picture, and `ignore_index`.
    """

    def __init__(self, source: Source, indices: range, numbers: Callable[[int], range], config: PalmEConfig) -> None:
        self.source, self.indices, self.numbers, self.config = source, indices, numbers, config

    def __iter__(self) -> Iterator[Batch | DataError]:
        """The batches, and at last an error if there was one: raised in a worker, it would arrive as a traceback."""
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            for index in self.indices[first::every]:
                yield self.batch(self.numbers(index))
        except DataError as error:
            yield error

    def batch(self, numbers: range) -> Batch:
        """The batch of these rows."""
        rows = self.source.read(numbers)
        new = self.source.first_epoch(numbers)
        examples = [row for row in rows if isinstance(row, Example)]
        size = self.config.image_size
        blank = torch.zeros(1, self.config.channels, size, size)
        texts = [torch.tensor(example.ids) for example in examples] or [torch.zeros(2, dtype=torch.int64)]
        return Batch(
            img=torch.stack([example.img for example in examples]) if examples else blank,
            text=pad_sequence(texts, batch_first=True, padding_value=self.config.ignore_index),
            targets=sum(len(example.ids) - 1 for example in examples),
            captions=[example.caption for example in examples],
            names=[example.name for example in examples],
            defects=[row for row in rows if isinstance(row, Defect)],
            rows=new,
            new_defects=sum(isinstance(row, Defect) for row in rows[:new]),
        )


@dataclass(frozen=True)
class Share:
    """Which rows of each global batch are whose: `count` micro-batches for each process, one after another.

    Args:
        batch_size: rows of a global batch; divisible by `processes * count`.
        count: micro-batches whose gradients are accumulated.
        process: the number of this process.
        processes: how many there are.
    """

    batch_size: int
    count: int = 1
    process: int = 0
    processes: int = 1

    def __call__(self, index: int) -> range:
        """The rows of the `index`-th micro-batch of this process."""
        step, part = divmod(index, self.count)
        size = self.batch_size // (self.processes * self.count)
        start = step * self.batch_size + (self.process * self.count + part) * size
        return range(start, start + size)


def load_batches(
    source: Source, indices: range, numbers: Callable[[int], range], config: PalmEConfig, num_workers: int
) -> Generator[Batch, None, None]:
    """Yield batches in order, read ahead by `num_workers` processes; 0 reads them in this one.

    Close the generator when an error leaves it unfinished: its readers heed SIGTERM, by which Python ends them, only
    from then on.

    Raises:
        DataError: as `Source.read`.
    """
    batches = Batches(source, indices, numbers, config)
    done = multiprocessing.RawValue("b", False)
    # A generator of its own: the loader would draw the seeds of its workers from the one that dropout draws from.
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=min(num_workers, len(indices)),
        generator=torch.Generator(),
        worker_init_fn=partial(_be_a_reader, done),
    )
    try:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        done.value = True


def _be_a_reader(done: Any, worker: int) -> None:
    ignore_interrupts_until(done)
    if hasattr(os, "nice"):
        os.nice(10)  # where cores are few, read in the gaps that the computation leaves
