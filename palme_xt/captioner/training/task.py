"""The task of a training run: what stays the same from its first step to its last, such as options and data."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palme_xt.captioner.data.batches import Batch, DataError, Defect, Source
from palme_xt.captioner.data.digits import LESSONS, Scenes, load_scans
from palme_xt.captioner.data.rows import load_data
from palme_xt.captioner.images import PREPROCESSING, Preprocessing, read_preprocessing
from palme_xt.captioner.options import DIGITS, Data, Training
from palme_xt.captioner.tokenizer import Tokenizer, warn_if_lossy
from palme_xt.captioner.training.run import Run
from palme_xt.config import PalmEConfig
from palme_xt.tokens import NUM_TOKENS


class Task(NamedTuple):
    """The model, the data and the options of a training run.

    Attributes:
        config: The model's arguments.
        training: How to train.
        data: Where the rows come from.
        tokenizer: How captions are converted to token ids.
        preprocessing: How images are converted to model inputs.
        rows: The rows to train on.
        held_out_rows: The rows to evaluate on.
        held_out_images: Number of held-out rows that each evaluation reads.
    """

    config: PalmEConfig
    training: Training
    data: Data
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    rows: Source
    held_out_rows: Source
    held_out_images: int

    @property
    def options(self) -> dict[str, Any]:
        """The options of `data` and `training`, by name, without the one that has no effect on these data."""
        options = asdict(self.data) | asdict(self.training)
        del options["augment" if self.data.data == DIGITS else "jitter"]
        return options

    def inputs(self, batch: Batch, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the keywords with which the model reads the images of a batch, and those with which it learns."""
        img = self.preprocessing.normalise(batch.img.to(device))
        learned = {"text": batch.text.to(device)}
        # A model of captions without placeholders needs no mask: it learns all tokens, as it is by default.
        if not (batch.target_mask | (batch.text == self.config.ignore_index))[:, 1:].all():
            learned["target_mask"] = batch.target_mask.to(device)
        return image_inputs(img, batch.counts, self.config), learned


def image_inputs(img: Tensor, counts: Sequence[int], config: PalmEConfig) -> dict[str, Any]:
    """Return the keywords with which a model reads several images of a sample, or none.

    A model that cross-attends reads the embeddings of a sample's images as one context.

    Args:
        img: The images of all samples, one after another, `(sum of counts, c, h, w)`.
        counts: Number of images of each sample.
        config: The config of the model.
    """
    if config.image_token is not None:
        return {"img": img.split([*counts])}
    if {*counts} == {1} or not config.cross_attend:
        return {"img": img}
    there = torch.arange(max(1, *counts), device=img.device) < torch.tensor(counts, device=img.device)[:, None]
    padded = img.new_zeros(*there.shape, *img.shape[1:])
    padded[there] = img
    return {"img": padded, "context_mask": there.repeat_interleave((config.image_size // config.patch_size) ** 2, 1)}


def open_task(
    config: PalmEConfig, training: Training, data: Data, tokenizer: Tokenizer, resumed: Run | None = None
) -> Task:
    """Open the data, and return the task, that of `resumed` if it is given.

    Raises:
        ValueError: If the model cannot learn these data.
        DataError: If the data cannot be loaded.
        ImageError: If a pretrained encoder does not say how images are normalised.
    """
    if config.num_tokens < tokenizer.num_tokens:
        rule = "for the tokenizer" if tokenizer.num_tokens != NUM_TOKENS else "to train on bytes: 256, BOS and EOS"
        raise ValueError(f"num_tokens={config.num_tokens} must be at least {tokenizer.num_tokens} {rule}")
    config = replace(config, bos_token=tokenizer.bos, eos_token=tokenizer.eos)
    count = training.eval_images
    if data.data == DIGITS:
        if training.augment:
            raise ValueError(f"augment=True has no effect with data={DIGITS}, whose scenes are composed: use jitter")
        if training.encoder is not None:
            raise ValueError(f"encoder={training.encoder} needs images: choose others than data={DIGITS}")
        preprocessing = Preprocessing.plain(config)
        asked, (scans, held_out_scans) = data.task == "questions", load_scans()
        how: dict[str, Any] = {"block": training.batch_size, "jitter": training.jitter, "lessons": LESSONS}
        scenes = Scenes(scans, config, tokenizer, seed=training.seed, asked=asked, **how)
        held_out_scenes = Scenes(held_out_scans, config, tokenizer, block=count, seed=0, asked=asked)
        return Task(config, training, data, tokenizer, preprocessing, scenes, held_out_scenes, count)
    preprocessing = Preprocessing.like_clip(config, data.fit)
    if training.encoder is not None and resumed is None:
        preprocessing = preprocessing.normalised_like(training.encoder)
    elif config.sources.get("encoder"):  # which may be gone
        before = read_preprocessing(resumed.folder if resumed else Path(training.start or ""), config)
        preprocessing = replace(preprocessing, mean=before.mean, std=before.std)
    rows, held_out = load_data(data, config, preprocessing, tokenizer, seed=training.seed, max_held_out=count)
    rows.augment_seed = training.seed if training.augment else None
    return Task(config, training, data, tokenizer, preprocessing, rows, held_out, min(len(held_out.rows), count))


def open_run(run: Run, task: Task, resume: bool) -> None:
    """Create the run folder, or check that it can be resumed with these data, and lock it.

    Warns if the tokenizer does not reproduce the held-out captions.

    Raises:
        DataError: If the data differ from those that the run started with, or no held-out row can be used.
        FolderError: If the folder cannot be written, or another process is training the run.
    """
    defects = _check_held_out_rows(task)
    before = run.training() if resume else {}
    now = {"rows_fingerprint": task.rows.fingerprint(), "held_out_fingerprint": task.held_out_rows.fingerprint()}
    for name, fingerprint in now.items():
        if before.get(name, fingerprint) != fingerprint:
            found = f"differs from the data that {run.folder} started with, in its {name}"
            raise DataError(f"data={task.data.data} {found}: restore the data, or start a new run")
    if not resume:
        files = task.tokenizer.files() | {PREPROCESSING: task.preprocessing.to_json().encode()}
        run.create(task.config, task.options | now, files)
    run.lock()
    run.log_skipped([defect._asdict() for defect in defects])


def _check_held_out_rows(task: Task) -> list[Defect]:
    """Read all held-out rows, so that unusable ones are found before training, and return these.

    Warns if the tokenizer does not reproduce the captions of the others.

    Raises:
        DataError: If no row can be used, or, with `strict`, if any row cannot.
    """
    defects, captions = list[Defect](), list[str]()
    for row in map(task.held_out_rows.row, range(task.held_out_images)):  # not at once: images may be many and large
        if isinstance(row, Defect):
            defects.append(row)
        else:
            captions += row.answers
    check_rows(defects, task.data.strict)
    if len(defects) == task.held_out_images:
        rule = "choose another split or number with --held_out"
        raise DataError(f"no held-out row is usable: {defects[0].detail}; {rule}")
    warn_if_lossy(task.tokenizer, captions)
    return defects


def check_rows(defects: Sequence[Defect], strict: bool) -> None:
    """Reject unusable rows if `strict`.

    Raises:
        DataError: If there is such a row.
    """
    if strict and defects:
        defect = defects[0]
        raise DataError(f"{defect.reason}: {defect.detail}; without --strict, such rows are skipped and counted")
