"""Train a captioner, in as many processes as `accelerate launch` starts, and show what it has learned."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from palme_xt.captioner import drawing, images
from palme_xt.captioner.data.batches import Batch, DataError, Defect, Example, Share, load_batches
from palme_xt.captioner.options import Data, Training
from palme_xt.captioner.signals import stop_on_signal
from palme_xt.captioner.tokenizer import Tokenizer
from palme_xt.captioner.training import checkpoint, distributed
from palme_xt.captioner.training.evaluate import Evaluation, evaluate
from palme_xt.captioner.training.run import EVALUATION, METRICS, Run
from palme_xt.captioner.training.task import Task, check_rows, open_run, open_task
from palme_xt.config import PalmEConfig
from palme_xt.storage.card import model_card
from palme_xt.storage.folder import CARD, WEIGHTS, as_json, as_safetensors

SAVED_IMAGES = 8
UNUSABLE_ROWS = 1000
NAMES_SHOWN = 8


class Outcome(NamedTuple):
    """The result of a training run.

    Attributes:
        evaluation: The evaluation of the saved weights, which have the lowest held-out loss.
        progress: Steps done, rows read and rows skipped, by all processes.
        interrupted: Whether a signal ended training before all steps were done.
    """

    evaluation: Evaluation
    progress: checkpoint.Progress
    interrupted: bool


def train(
    config: PalmEConfig, training: Training, data: Data, tokenizer: Tokenizer, run: Run, *, resume: bool = False
) -> Outcome:
    """Train a new model, or resume a run, and keep the run folder usable at all times.

    Call it in all processes with the same arguments; only the first process writes. The run folder keeps the weights
    with the lowest held-out loss, and a checkpoint of the last ones. SIGINT (Ctrl-C), SIGTERM or SIGHUP ends training
    after the current step: a checkpoint is written, the model is evaluated if it has not been yet, and the run can be
    resumed. A second signal, some seconds later, ends the process at once.

    Args:
        config: The model's arguments.
        training: How to train. A resumed run may have other `steps` and `patience` than before.
        data: The captioned images.
        tokenizer: How captions become token ids.
        run: The run folder, which does not exist yet unless it is resumed.
        resume: Continue from the last checkpoint in the folder.

    Raises:
        ValueError: If the model cannot learn these data, or a resumed run has done more than `training.steps` steps.
        FolderError: If `training.start` does not hold weights of such a model.
        DataError: If the data cannot be loaded, differ from those that the run started with, or have an unusable row
            with `data.strict`.
        FolderError: If the run folder cannot be written, or another process is training the run. The last checkpoint is
            unchanged.
        TrainingError: If the loss is not finite, in which case the last checkpoint is an earlier one, or if training
            cannot run in these processes.
    """
    accelerator = distributed.make_accelerator(training, run.folder / "logs", config)
    with distributed.shutdown_on_exit(accelerator):
        try:
            with distributed.Errors().shared():
                share = _share(training, accelerator)
                training = replace(training, mixed_precision=accelerator.mixed_precision)
                task = open_task(config, training, data, tokenizer, run if resume else None)
            distributed.in_first_process(accelerator, open_run, run, task, resume)
            return _Trainer(accelerator, task, share, run, resume).train()
        finally:
            run.unlock()


class _Trainer:
    """A training run in progress: `task` holds what stays the same, `state` what changes."""

    def __init__(self, accelerator: Accelerator, task: Task, share: Share, run: Run, resume: bool) -> None:
        self.accelerator, self.task, self.share, self.run = accelerator, task, share, run
        self.main, self.errors, self.unusable_rows = accelerator.is_main_process, distributed.Errors(), 0
        self.skipped: list[Defect] = []  # since the last checkpoint, by this process
        resumable = resume and (run.folder / checkpoint.CHECKPOINT).is_file()
        self.state = checkpoint.initial_state(accelerator, task.config, task.training, new=not resumable)
        self.best = Evaluation.saved(run) if resume else None
        if resume:
            checkpoint.load(run, self.state)
        step, steps = self.state.progress.step, task.training.steps
        with self.errors.shared():
            if steps < step:
                raise ValueError(f"steps={steps} must be at least {step}, the number that {run.folder} has done")
            if resume and self.main:
                run.change(steps=steps, patience=task.training.patience)
            if task.training.log_with:
                values = {name: value for name, value in task.options.items() if value is not None}
                purged = {"purge_step": step + 1} if step else {}  # TensorBoard drops steps that will be repeated
                accelerator.init_trackers("palme_xt", values, {"tensorboard": purged})
        self.shown = {"loss": "-", "exact match": "-", "chrF": "-", "images/s": "-"}
        # Without smoothing, the time left includes that of evaluations.
        self.bar = tqdm(total=steps, initial=step, desc="training", unit="step", smoothing=0, disable=not self.main)

    def train(self) -> Outcome:
        """Run the remaining steps, and evaluate and save the model in between and at the end."""
        task, state, progress, training = self.task, self.state, self.state.progress, self.task.training
        count, stop = training.gradient_accumulation_steps, False
        left = range(progress.step * count, training.steps * count)
        reading = load_batches(task.rows, left, self.share, task.config, task.data.num_workers)
        with self.bar, stop_on_signal() as stop_requested, contextlib.closing(reading) as batches:
            while progress.step < training.steps and not self.stalled():
                started = time.perf_counter()
                micro_batches, targets, stop = self.read(batches, stop_requested.is_set())
                state.random_states = checkpoint.random_state()  # to resume from before this step
                loss = self.compute_gradients(micro_batches, targets) if targets else math.nan
                if targets and (stop or progress.step % training.save_every == 0):
                    # Save the weights from before this step, whose loss and gradient are now known to be finite.
                    self.save_checkpoint()
                if stop:
                    break
                self.update_weights(micro_batches, targets)
                self.log(loss, training.batch_size / (time.perf_counter() - started))
                if progress.step % training.eval_every == 0 or progress.step == training.steps:
                    self.evaluate()
            if not stop:
                state.random_states = checkpoint.random_state()
            best = self.best or self.evaluate(interrupted=stop)
            self.save_checkpoint()
        distributed.in_first_process(self.accelerator, self.draw, best)
        return Outcome(best, checkpoint.total_progress(progress), stop)

    def stalled(self) -> bool:
        """Return whether the last `patience` evaluations, up to this step, have not lowered the held-out loss."""
        training, step = self.task.training, self.state.progress.step
        if training.patience is None or self.best is None or step % training.eval_every:
            return False
        return step - self.best.step >= training.patience * training.eval_every

    def read(self, batches: Iterator[Batch], stop: bool) -> tuple[list[Batch], int, bool]:
        """Return the micro-batches of the next step, the targets of all processes, and whether any has to stop."""
        micro_batches: list[Batch] = []
        with self.errors.held():
            micro_batches = list(islice(batches, self.share.count))
            check_rows([defect for batch in micro_batches for defect in batch.defects], self.task.data.strict)
        own = [sum(batch.targets for batch in micro_batches), int(stop), int(self.errors.own is not None)]
        # Use one reduction for all three, because the processes wait for one another in each.
        targets, stops, failures = self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device)).tolist()
        if failures:
            self.errors.meet()
        return micro_batches, targets, stops > 0

    def compute_gradients(self, micro_batches: Sequence[Batch], targets: int) -> float:
        """Compute the gradients of the mean loss over the targets of all processes, clip them, and return that loss.

        If the loss or the gradient is not finite, the names of the batch go to `metrics.jsonl`.

        Raises:
            TrainingError: If the loss or the gradient is not finite, or `DistributedDataParallel` would wait for
                gradients that never come.
        """
        task, state, accelerator, losses = self.task, self.state, self.accelerator, []
        for batch in micro_batches:
            with contextlib.nullcontext() if batch is micro_batches[-1] else accelerator.no_sync(state.model):
                shown, learned = task.inputs(batch, accelerator.device)
                loss = state.model(**shown, **learned)
                # Processes average their gradients. This weight makes it the gradient of the mean over all targets.
                accelerator.backward(loss * (batch.targets * accelerator.num_processes / targets))
                losses.append(loss.detach() * (batch.targets / targets))
        _check_all_have_gradients(state.model)
        mean = float(accelerator.reduce(torch.stack(losses).sum()))
        norm = float(accelerator.clip_grad_norm_(state.model.parameters(), task.training.grad_clip))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            step = state.progress.step + 1
            names = gather_object([name for batch in micro_batches for name in batch.names])
            with self.errors.shared():
                if self.main:
                    self.run.log(step=step, loss=mean, gradient_norm=norm, batch=names)
                value = f"gradient norm of {norm}" if math.isfinite(mean) else f"loss of {mean}"
                more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
                where = f"at step {step}, batch {', '.join(names[:NAMES_SHOWN])}{more}"
                keeps = f"{self.run.folder} keeps the last good weights, and {METRICS} lists all names"
                raise distributed.TrainingError(f"lr={task.training.lr} led to a {value} {where}: lower it; {keeps}")
        return mean

    def update_weights(self, micro_batches: list[Batch], targets: int) -> None:
        """Finish the step, and count its rows.

        Raises:
            DataError: If too many rows in succession are unusable.
        """
        self.unusable_rows = 0 if targets else self.unusable_rows + self.share.batch_size
        if self.unusable_rows >= UNUSABLE_ROWS:
            found = f"{self.unusable_rows} unusable rows in succession: {micro_batches[0].defects[0].detail}"
            raise DataError(f"data={self.task.data.data} has {found}")
        self.state.optimizer.step()
        self.state.schedule.step()
        self.state.optimizer.zero_grad()
        progress = self.state.progress
        progress.step += 1
        for batch in micro_batches:
            progress.rows += batch.rows
            new = batch.defects[: batch.new_defects]
            progress.skipped.update(defect.reason for defect in new)
            self.skipped += new

    def log(self, loss: float, images_per_second: float) -> None:
        """Log a step to `metrics.jsonl`, the trackers and the progress bar."""
        step, skipped = self.state.progress.step, self.state.progress.skipped.total()
        metrics = {"loss": loss, "images_per_second": images_per_second}
        with self.errors.held():  # until the next step, where the processes meet anyway
            if self.main:
                self.run.log(step=step, **metrics)
            self.accelerator.log(metrics | {"lr": self.state.schedule.get_last_lr()[-1]}, step=step)
        self.shown |= {"loss": f"{loss:.3f}", "images/s": f"{images_per_second:.0f}"}
        self.shown |= {"skipped": f"{skipped}"} if skipped else {}
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def evaluate(self, interrupted: bool = False) -> Evaluation:
        """Evaluate the weights, log the result, and save the weights if no earlier ones have a lower held-out loss.

        Raises:
            TrainingError: If the held-out loss is not finite.
        """
        accelerator, task, step = self.accelerator, self.task, self.state.progress.step
        weights = checkpoint.full_weights(self.state.model)
        model = checkpoint.unsharded(accelerator.unwrap_model(self.state.model), weights)
        evaluation = evaluate(task, accelerator, model, step, 4 * len(self.share(0)))
        evaluation = evaluation._replace(interrupted=interrupted)
        skipped, scores = checkpoint.total_progress(self.state.progress).skipped, evaluation.scores
        if not math.isfinite(evaluation.loss):
            found = f"led to a held-out loss of {evaluation.loss} after step {step}"
            keeps = f"{self.run.folder} keeps the earlier weights"
            raise distributed.TrainingError(f"lr={task.training.lr} {found}: lower it; {keeps}")
        if self.best is None or evaluation.loss < self.best.loss:
            self.best = evaluation
            distributed.in_first_process(accelerator, self.save_weights, weights)
        with self.errors.shared():
            if self.main:
                marked = {"interrupted": True} if interrupted else {}
                self.run.log(step=step, **scores, skipped_rows=skipped.total(), **marked)
            accelerator.log(scores, step=step)
        self.shown["exact match"] = f"{scores['held_out_exact_match']:.1%}"
        self.shown["chrF"] = f"{scores['held_out_chrf']:.1f}"
        self.bar.set_postfix(self.shown)
        return evaluation

    def save_checkpoint(self) -> None:
        """Save a checkpoint, and its weights for captioning if they are trained and none have been evaluated yet.

        The rows that were skipped are written first. A run that ends in between resumes from before them.
        """
        skipped = gather_object([defect._asdict() for defect in self.skipped])
        distributed.in_first_process(self.accelerator, self.run.log_skipped, skipped)
        self.skipped = []
        checkpoint.save(self.run, self.state)
        if self.best is None and self.state.progress.step:
            weights = checkpoint.full_weights(self.state.model)
            distributed.in_first_process(self.accelerator, self.save_weights, weights)

    def save_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Save weights with their evaluation, if any, and a model card."""
        values: dict[str, Any] = {"step": self.state.progress.step}
        described = values | {"selected_by": "last checkpoint"}
        if (evaluation := self.best) is not None:
            values, held_out = evaluation._asdict(), {"held_out_images": len(evaluation.predicted)}
            described |= {"selected_by": "lowest held-out loss"} | held_out | evaluation.scores
        card = model_card(self.task.config, self.task.options, described)
        self.run.write({WEIGHTS: as_safetensors(weights), EVALUATION: as_json(values), CARD: card.encode()})

    def draw(self, evaluation: Evaluation) -> None:
        """Draw held-out images with their captions, and the loss curve."""
        task, folder = self.task, self.run.folder
        rows = task.held_out_rows.read(range(min(task.held_out_images, drawing.COLUMNS * drawing.ROWS)))
        # A row without images is drawn as a black one.
        pixels = [F.pad(row.imgs, (0,) * 7 + (1,))[0] for row in rows if isinstance(row, Example)]
        if pixels:
            img = torch.stack(pixels)
            images.save_images(img[:SAVED_IMAGES], folder / "held_out")
            drawing.draw_samples(img, evaluation.predicted, evaluation.references, folder / "samples.png")
        drawing.draw_loss(self.run.metrics(), folder / "loss.png", evaluation.step)


def _check_all_have_gradients(model: nn.Module) -> None:
    weights = model.module.named_parameters() if isinstance(model, DistributedDataParallel) else ()
    if names := [name for name, weight in weights if weight.requires_grad and weight.grad is None]:
        rule = "train in one process, or without the option that leaves them unused, such as vit_kwargs.num_classes"
        found = f"{names[0]} and {len(names) - 1} more parameters get no gradient"
        raise distributed.TrainingError(f"{found}, and data-parallel processes wait for them: {rule}")


def _share(training: Training, accelerator: Accelerator) -> Share:
    processes, count = accelerator.num_processes, training.gradient_accumulation_steps
    if training.batch_size % (processes * count):
        divisor = f"{processes} processes times gradient_accumulation_steps={count}"
        rule = f"must be divisible by {divisor}: it is the batch size of all processes together"
        raise ValueError(f"batch_size={training.batch_size} {rule}")
    return Share(training.batch_size, count, accelerator.process_index, processes)
