"""Evaluate a model on held-out images: the loss of their captions, and the captions that it generates."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor
from tqdm import tqdm

from palme_xt.captioner.data.batches import DataError, load_batches, positions
from palme_xt.captioner.tokenizer import Tokenizer
from palme_xt.captioner.training.distributed import Errors
from palme_xt.captioner.training.run import EVALUATION, Run
from palme_xt.captioner.training.task import Task, check_rows
from palme_xt.captioner.turns import question_text
from palme_xt.decoding.loop import evaluating
from palme_xt.model import PalmE

LARGEST_BATCH = 128


class Evaluation(NamedTuple):
    """The result of an evaluation on held-out images, as `evaluation.json` holds it for the saved weights.

    Attributes:
        step: Number of optimizer steps that the weights were trained for.
        loss: The mean loss of the true captions, in nats per token.
        references: The true captions of each image, as the tokenizer reproduces them.
        predicted: The caption that the model generated for each image.
        skipped: Number of rows that could not be evaluated, by reason.
        interrupted: Whether a signal led to the evaluation, which an uninterrupted run would not have made.
        questions: The question that each text answers, as in `palme_xt.captioner.turns.Turn`.
    """

    step: int
    loss: float
    references: list[list[str]]
    predicted: list[str]
    skipped: dict[str, int]
    interrupted: bool = False
    questions: Sequence[str] = ()

    @classmethod
    def saved(cls, run: Run) -> Self | None:
        """Return the evaluation of the saved weights, or None if an uninterrupted run would not have evaluated them."""
        path = run.folder / EVALUATION
        values = json.loads(path.read_bytes()) if path.is_file() else {}
        return cls(**values) if "loss" in values and not values["interrupted"] else None

    @property
    def right(self) -> list[bool]:
        """Whether the caption of each image equals one of its true captions to the last character."""
        return [caption in true for caption, true in zip(self.predicted, self.references, strict=True)]

    @property
    def scores(self) -> dict[str, float]:
        """The results by the names that `metrics.jsonl`, trackers and the model card give them.

        `held_out_exact_match` is the share of images whose caption is exactly right, 0..1. `held_out_chrf` is chrF2,
        0..100, the F-score of the captions' character n-grams up to length 6 against the best reference (Popović 2015,
        aclanthology.org/W15-3049, as computed by sacrebleu).
        """
        chrf = CHRF().corpus_score(self.predicted, list(zip_longest(*self.references))).score
        exact_match = sum(self.right) / len(self.right)
        return {"held_out_exact_match": exact_match, "held_out_chrf": chrf, "held_out_loss": self.loss}


@torch.no_grad()
def evaluate(task: Task, accelerator: Accelerator, model: PalmE, step: int, batch_size: int) -> Evaluation:
    """Evaluate held-out images, shared among all processes. Call it in all processes.

    Args:
        task: The task, for the held-out rows and how to read them.
        accelerator: The accelerator of the processes.
        model: A model that each process can run on its own.
        step: Number of optimizer steps done.
        batch_size: Number of images that each process computes at once, limited to 128.

    Raises:
        DataError: If no row can be evaluated, or, with `strict`, if any row cannot.
    """
    size, count = min(batch_size, LARGEST_BATCH), task.held_out_images
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    own = range(accelerator.process_index, len(batches), accelerator.num_processes)
    hidden, tokenizer, image_token = not accelerator.is_main_process, task.tokenizer, task.config.image_token
    parts: list[tuple[int, float, int, list[list[str]], list[str], list[str], list[str]]] = []
    with Errors().shared(), evaluating(model):
        loaded = load_batches(task.held_out_rows, own, batches.__getitem__, model.config, 0)
        reading = tqdm(loaded, "evaluating", len(own), leave=False, unit="batch", delay=1, disable=hidden)
        for number, batch in zip(own, reading, strict=True):
            check_rows(batch.defects, task.data.strict)
            loss, predicted, asked = 0.0, list[str](), list[str]()
            references = [[*map(tokenizer.round_trip, captions)] for captions in batch.references]
            if batch.targets:
                asked = [question_text(prompt.tolist(), tokenizer, image_token) for prompt in batch.prompts]
                shown, learned = task.inputs(batch, accelerator.device)
                loss = model(**shown, **learned).item() * batch.targets
                # A model that computes nan cannot decode. The loss reports it.
                decodable = math.isfinite(loss)
                predicted = answers(model, batch.prompts, tokenizer, shown) if decodable else [""] * len(references)
            reasons = [defect.reason for defect in batch.defects]
            parts.append((number, loss, batch.targets, references, predicted, asked, reasons))
    _, losses, targets, true, generated, questions, defects = zip(*sorted(gather_object(parts)), strict=True)
    if not sum(targets):
        raise DataError("no held-out row is usable any more: restore the data")
    loss, references, predicted = sum(losses) / sum(targets), [*chain(*true)], [*chain(*generated)]
    return Evaluation(step, loss, references, predicted, dict(Counter(chain(*defects))), questions=[*chain(*questions)])


def answers(model: PalmE, prompts: Sequence[Tensor], tokenizer: Tokenizer, shown: dict[str, Any]) -> list[str]:
    """Return what a model answers to prompts `(t_i,)`, greedily, the same as for each prompt alone.

    Args:
        model: The model.
        prompts: The token ids of the prompts.
        tokenizer: How answers are written.
        shown: The keywords with which the model reads the images, as `Task.inputs` returns them.
    """
    room = [model.config.max_seq_len - positions(prompt.tolist(), model.config) for prompt in prompts]
    prompts = [prompt.to(next(model.parameters()).device) for prompt in prompts]
    # A long prompt leaves less room than the shortest one.
    how: dict[str, Any] = {"seq_len": max(room), "restrict_to_max_seq_len": False, "temperature": 0.0}
    found = model.generate(prompts=prompts, eos_token=tokenizer.eos, **shown, **how)
    return [tokenizer.decode(row[:most]) for row, most in zip(found.tolist(), room, strict=True)]
