"""What a model makes of held-out pictures: the loss of their captions, and captions of its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from palme_xt.captioner.caption import caption
from palme_xt.captioner.data.batches import Batch, DataError, Source, load_batches
from palme_xt.captioner.images import Preprocessing
from palme_xt.captioner.tokenizer import Tokenizer
from palme_xt.captioner.training.distributed import Errors
from palme_xt.decoding import evaluating
from palme_xt.model import PalmE

AT_ONCE = 128


@dataclass(frozen=True)
class Evaluation:
    """How a model does on held-out pictures.

    Attributes:
        true: their captions.
        predicted: those that the model generated.
        loss: of the true captions, nats a token.
        skipped: rows that could not be evaluated, by reason.
    """

    true: list[str]
    predicted: list[str]
    loss: float
    skipped: dict[str, int]

    @property
    def exact_match(self) -> float:
        """Share of held-out pictures whose caption is right to the last character."""
        return sum(map(str.__eq__, self.predicted, self.true)) / len(self.true)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: PalmE,
    held_out: Source,
    count: int,
    at_once: int,
    preprocessing: Preprocessing,
    tokenizer: Tokenizer,
    strict: bool,
) -> Evaluation:
    """Evaluate the first `count` rows of `held_out`, shared among all processes; to be called in all of them.

    Args:
        at_once: pictures that a process computes at once, at most; no more than 128 in any case.
        strict: a row that cannot be evaluated is an error.

    Raises:
        DataError: no row can be evaluated, or not all with `strict`.
    """
    at_once = min(at_once, AT_ONCE)
    chunks = [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]
    mine = range(accelerator.process_index, len(chunks), accelerator.num_processes)
    parts: list[tuple[int, list[str], list[str], float, int, list[str]]] = []
    errors = Errors()
    with errors.held(), evaluating(model):
        for number, batch in zip(mine, load_batches(held_out, mine, chunks.__getitem__, model.config, 0), strict=True):
            check_rows([batch], strict)
            loss, predicted = 0.0, list[str]()
            if batch.targets:
                img = preprocessing.normalise(batch.img.to(accelerator.device))
                loss = model(img, batch.text.to(accelerator.device)).item() * batch.targets
                # Nothing is decoded from nan: the loss tells.
                predicted = caption(model, img, tokenizer) if math.isfinite(loss) else batch.captions
            reasons = [defect.reason for defect in batch.defects]
            parts.append((number, batch.captions, predicted, loss, batch.targets, reasons))
    errors.meet()
    parts = sorted(gather_object(parts))
    targets = sum(part[4] for part in parts)
    if not targets:
        raise DataError("no held-out row is usable: name another split or number with --held_out")
    true, guessed = [text for part in parts for text in part[1]], [text for part in parts for text in part[2]]
    skipped = Counter(reason for part in parts for reason in part[5])
    return Evaluation(true, guessed, sum(part[3] for part in parts) / targets, dict(skipped))


def whole(model: PalmE, weights: dict[str, Tensor]) -> PalmE:
    """`model`, or where it is sharded, a copy with these weights that any process can run on its own."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.random.fork_rng(devices=[]):
        copy = PalmE.from_config(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy.to(next(iter(weights.values())).device)


def check_rows(batches: Sequence[Batch], strict: bool) -> None:
    """Refuse rows that cannot be learned from, if `strict`.

    Raises:
        DataError: there is one.
    """
    defect = next((defect for batch in batches for defect in batch.defects), None)
    if strict and defect is not None:
        raise DataError(f"{defect.reason}: {defect.detail}; without --strict such rows are skipped and counted")
