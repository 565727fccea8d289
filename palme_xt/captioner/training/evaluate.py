"""Evaluate a model on held-out images: the loss of their captions, and the captions that it generates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from palme_xt.captioner.caption import caption
from palme_xt.captioner.data.batches import Batch, DataError, load_batches
from palme_xt.captioner.training.distributed import Errors
from palme_xt.captioner.training.task import Task
from palme_xt.decoding.loop import evaluating
from palme_xt.model import PalmE

LARGEST_BATCH = 128


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation on held-out images.

    Attributes:
        true: The captions in the data.
        predicted: The captions that the model generated.
        loss: The mean loss of the true captions, in nats per token.
        skipped: Number of rows that could not be evaluated, by reason.
    """

    true: list[str]
    predicted: list[str]
    loss: float
    skipped: dict[str, int]

    @property
    def exact_match(self) -> float:
        """The share of images whose caption is right to the last character."""
        return sum(map(str.__eq__, self.predicted, self.true)) / len(self.true)


@torch.no_grad()
def evaluate(task: Task, accelerator: Accelerator, model: PalmE, batch_size: int) -> Evaluation:
    """Evaluate held-out images, shared among all processes. Call it in all processes.

    Args:
        task: The task, for the held-out rows and how to read them.
        accelerator: The accelerator of the processes.
        model: A model that each process can run on its own.
        batch_size: Number of images that each process computes at once, limited to 128.

    Raises:
        DataError: If no row can be evaluated, or, with `strict`, if any row cannot.
    """
    size, count = min(batch_size, LARGEST_BATCH), task.held_out_images
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    own = range(accelerator.process_index, len(batches), accelerator.num_processes)
    parts: list[tuple[int, float, int, list[str], list[str], list[str]]] = []
    with Errors().shared(), evaluating(model):
        loaded = load_batches(task.held_out_rows, own, batches.__getitem__, model.config, 0)
        for number, batch in zip(own, loaded, strict=True):
            check_rows([batch], task.data.strict)
            loss, predicted = 0.0, list[str]()
            if batch.targets:
                img = task.preprocessing.normalise(batch.img.to(accelerator.device))
                loss = model(img, batch.text.to(accelerator.device)).item() * batch.targets
                # A model that computes nan cannot decode. The loss reports it.
                predicted = caption(model, img, task.tokenizer) if math.isfinite(loss) else batch.captions
            reasons = [defect.reason for defect in batch.defects]
            parts.append((number, loss, batch.targets, batch.captions, predicted, reasons))
    _, losses, targets, true, generated, defects = zip(*sorted(gather_object(parts)), strict=True)
    if not sum(targets):
        raise DataError("no held-out row is usable: choose another split or number with --held_out")
    skipped = Counter(chain(*defects))
    return Evaluation([*chain(*true)], [*chain(*generated)], sum(losses) / sum(targets), dict(skipped))


def unsharded(model: PalmE, weights: dict[str, Tensor]) -> PalmE:
    """Return `model`, or, if it is sharded, a copy with these weights that each process can run on its own."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.random.fork_rng(devices=[]):
        copy = PalmE.from_config(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy.to(next(iter(weights.values())).device)


def check_rows(batches: Sequence[Batch], strict: bool) -> None:
    """Reject unusable rows if `strict`.

    Raises:
        DataError: If there is such a row.
    """
    defect = next((defect for batch in batches for defect in batch.defects), None)
    if strict and defect is not None:
        raise DataError(f"{defect.reason}: {defect.detail}; without --strict, such rows are skipped and counted")
