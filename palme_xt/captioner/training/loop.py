"""Train a captioner, on as many processes as `accelerate launch` starts, and show what it has learned."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from palme_xt import tokens
from palme_xt.captioner import drawing as pictures
from palme_xt.captioner.data import digits
from palme_xt.captioner.data.batches import Batch, DataError, Example, Share, Source, load_batches
from palme_xt.captioner.data.rows import load_data
from palme_xt.captioner.images import PREPROCESSING, Preprocessing, save_images
from palme_xt.captioner.options import DIGITS, Data, Training
from palme_xt.captioner.tokenizer import Tokenizer
from palme_xt.captioner.training.checkpoint import (
    Progress,
    load_checkpoint,
    of_all_processes,
    random_state,
    save_checkpoint,
    whole_state_dict,
)
from palme_xt.captioner.training.distributed import (
    Errors,
    TrainingError,
    ended,
    make_accelerator,
    refuse_parameters_without_gradient,
    start_trackers,
)
from palme_xt.captioner.training.evaluate import Evaluation, check_rows, evaluate, whole
from palme_xt.captioner.training.interrupts import told_to_stop
from palme_xt.captioner.training.run import METRICS, Run
from palme_xt.config import PalmEConfig
from palme_xt.model import PalmE
from palme_xt.storage.card import model_card

SAVED_IMAGES = 8
UNUSABLE_AT_MOST = 1000
NAMED = 8


@dataclass(frozen=True)
class Outcome:
    """What training came to.

    Attributes:
        evaluation: of the weights that it came to.
        progress: steps done, rows read and rows skipped.
        interrupted: by a signal, before all steps were done.
    """

    evaluation: Evaluation
    progress: Progress
    interrupted: bool


def warm_up_and_decay(step: int, steps: int) -> float:
    """The share of the peak learning rate at `step` of `steps`: linear up in the first tenth, then half a cosine."""
    warm_up = steps // 10
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(
    config: PalmEConfig, training: Training, data: Data, tokenizer: Tokenizer, run: Run, *, resume: bool = False
) -> Outcome:
    """Train a new model, or go on with one, keeping `run` usable all the while.

    Called in all processes alike. SIGINT (Ctrl-C) and SIGTERM end the training after the step, not the run: what has
    been learned is saved, evaluated and shown, and can be resumed. A second one, some seconds later, ends at once. The
    first process alone writes.

    Raises:
        ValueError: the model cannot learn these data.
        DataError: the data cannot be loaded, or are not those that the run began with, or a row is wrong and
            `data.strict`.
        RunError: the run folder cannot be written, or another process trains it; its last checkpoint is as it was.
        TrainingError: the loss is not finite, and the last checkpoint is from before; or these processes cannot train.
    """
    accelerator = make_accelerator(training.mixed_precision, training.log_with, run.folder / "logs", config)
    with ended(accelerator):
        try:
            return _train(accelerator, config, training, data, tokenizer, run, resume)
        finally:
            run.unlock()


def _train(
    accelerator: Accelerator,
    config: PalmEConfig,
    training: Training,
    data: Data,
    tokenizer: Tokenizer,
    run: Run,
    resume: bool,
) -> Outcome:
    main = accelerator.is_main_process
    errors = Errors()
    share = _share(training, accelerator)
    preprocessing = Preprocessing.plain(config) if data.data == DIGITS else Preprocessing.like_clip(config)
    described = asdict(data) | asdict(training) | {"mixed_precision": accelerator.mixed_precision}
    with errors.held():
        source, held_out, evaluated = _open(config, training, data, preprocessing, tokenizer)
        if main:
            fingerprints = {"rows_fingerprint": source.fingerprint(), "held_out_fingerprint": held_out.fingerprint()}
            if resume:
                _check_fingerprints(fingerprints, data, run)
            else:
                files = tokenizer.files() | {PREPROCESSING: preprocessing.to_json().encode()}
                run.create(config, described | fingerprints, files)
            run.lock()
    errors.meet()

    set_seed(training.seed)
    model = PalmE.from_config(config)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=training.lr,
        betas=(0.9, 0.98),
        weight_decay=training.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_decay(step, training.steps))
    trained, prepared = accelerator.prepare(model, optimizer)
    set_seed(training.seed, device_specific=True)
    progress = load_checkpoint(run, accelerator, trained, optimizer, schedule) if resume else Progress()
    with errors.held():
        if main and resume:
            run.forget_metrics_after(progress.metrics_size)
        if training.log_with:
            start_trackers(accelerator, described, progress.step)
    errors.meet()
    count = training.gradient_accumulation_steps

    def learn(micro_batches: list[Batch], targets: int) -> float:
        """Gradients of the mean loss over the targets of all processes; that loss."""
        losses = []
        for number, batch in enumerate(micro_batches, 1):
            with contextlib.nullcontext() if number == count else accelerator.no_sync(trained):
                img, text = batch.img.to(accelerator.device), batch.text.to(accelerator.device)
                loss = trained(preprocessing.normalise(img), text)
                # Processes average their gradients: so weighted, they give that of the mean over all targets.
                accelerator.backward(loss * (batch.targets * accelerator.num_processes / targets))
                losses.append(loss.detach() * (batch.targets / targets))
        refuse_parameters_without_gradient(trained)
        mean = float(accelerator.reduce(torch.stack(losses).sum()))
        norm = float(accelerator.clip_grad_norm_(trained.parameters(), training.grad_clip))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            names = gather_object([name for batch in micro_batches for name in batch.names])
            with errors.held():
                if main:
                    run.log(step=progress.step + 1, loss=mean, gradient_norm=norm, batch=names)
                raise TrainingError(_not_finite(mean, norm, names, progress, training, run))
            errors.meet()
        return mean

    def evaluate_and_save_weights() -> tuple[Evaluation, Progress]:
        weights = whole_state_dict(trained)
        at_once = 4 * len(share(0))
        evaluation = evaluate(
            accelerator, whole(model, weights), held_out, evaluated, at_once, preprocessing, tokenizer, data.strict
        )
        if not math.isfinite(evaluation.loss):
            raise TrainingError(
                f"lr={training.lr} led to a held-out loss of {evaluation.loss} {_so_far(progress, run)}"
            )
        total = of_all_processes(progress)
        metrics = {"held_out_exact_match": evaluation.exact_match, "held_out_loss": evaluation.loss}
        with errors.held():
            if main:
                run.save(weights)
                run.log(step=progress.step, **metrics, skipped_rows=sum(total.skipped.values()))
                described_metrics = {"step": progress.step, "held_out_images": len(evaluation.true)} | metrics
                run.write("README.md", model_card(config, described, described_metrics).encode())
            accelerator.log(metrics, step=progress.step)
        errors.meet()
        return evaluation, total

    def remember_metrics() -> None:
        with errors.held():
            if main:
                progress.metrics_size = run.metrics_size()

    def save(random_states: dict[str, Tensor]) -> None:
        with errors.held():
            save_checkpoint(run, accelerator, trained, optimizer, schedule, progress, random_states)
        errors.meet()

    stop = unusable = 0
    random_states: dict[str, Tensor] = {}
    shown = {"held-out exact match": "-"}
    bar = tqdm(total=training.steps, initial=progress.step, desc="training", unit="step", disable=not main)
    todo = range(progress.step * count, training.steps * count)
    batches = contextlib.closing(load_batches(source, todo, share, config, data.num_workers))
    with bar, told_to_stop() as told, batches as micro:
        started = time.perf_counter()
        while progress.step < training.steps:
            micro_batches: list[Batch] = []
            with errors.held():
                micro_batches = [next(micro) for _ in range(count)]
                check_rows(micro_batches, data.strict)
            mine = [sum(batch.targets for batch in micro_batches), int(told.is_set()), int(errors.mine is not None)]
            targets, stop, failed = accelerator.reduce(torch.tensor(mine, device=accelerator.device)).tolist()
            if failed:
                errors.meet()
            due = stop or progress.step % training.save_every == 0
            random_states = random_state() if due else {}
            mean = math.nan
            if targets:
                mean = learn(micro_batches, targets)
                if due:  # and known to be good: the loss and the gradient of these weights are finite
                    remember_metrics()
                    save(random_states)
            if stop:
                break
            unusable = 0 if targets else unusable + training.batch_size
            if unusable >= UNUSABLE_AT_MOST:
                raise DataError(
                    f"data={data.data} has no usable row among {unusable} in a row: "
                    f"{micro_batches[0].defects[0].detail}"
                )
            prepared.step()
            schedule.step()
            prepared.zero_grad()
            progress.step += 1
            _count_rows(progress, micro_batches)

            speed = training.batch_size / (time.perf_counter() - started)
            with errors.held():
                if main:
                    run.log(step=progress.step, loss=mean, images_per_second=speed)
                logged = {"loss": mean, "lr": schedule.get_last_lr()[0], "images_per_second": speed}
                accelerator.log(logged, step=progress.step)
            if progress.skipped:
                shown["skipped"] = f"{sum(progress.skipped.values())}"
            bar.set_postfix({"loss": f"{mean:.3f}", **shown, "images/s": f"{speed:.0f}"}, refresh=False)
            bar.update()
            if progress.step % training.eval_every == 0 and progress.step < training.steps:
                evaluation, _ = evaluate_and_save_weights()
                shown["held-out exact match"] = f"{evaluation.exact_match:.1%}"
            started = time.perf_counter()
        remember_metrics()  # a run that goes on from here evaluates at the end again, or not here
        random_states = random_states if stop else random_state()
        evaluation, total = evaluate_and_save_weights()
        save(random_states)
        shown["held-out exact match"] = f"{evaluation.exact_match:.1%}"
        bar.set_postfix(shown)
    with errors.held():
        if main:
            _draw(held_out, evaluated, preprocessing, evaluation, run)
    errors.meet()
    return Outcome(evaluation, total, bool(stop))


def _draw(held_out: Source, evaluated: int, preprocessing: Preprocessing, evaluation: Evaluation, run: Run) -> None:
    rows = held_out.read(range(min(evaluated, pictures.COLUMNS * pictures.ROWS)))
    pixels = [row.img for row in rows if isinstance(row, Example)]
    if pixels:
        img = preprocessing.shown(preprocessing.normalise(torch.stack(pixels)))
        save_images(img[:SAVED_IMAGES], run.folder / "held_out")
        pictures.draw_samples(img, evaluation.predicted, evaluation.true, run.folder / "samples.png")
    pictures.draw_loss(run.metrics(), run.folder / "loss.png")


def _share(training: Training, accelerator: Accelerator) -> Share:
    processes, count = accelerator.num_processes, training.gradient_accumulation_steps
    if training.batch_size % (processes * count):
        raise ValueError(
            f"batch_size={training.batch_size} must be divisible by {processes} processes times "
            f"gradient_accumulation_steps={count}: it is that of all processes together"
        )
    return Share(training.batch_size, count, accelerator.process_index, processes)


def _open(
    config: PalmEConfig, training: Training, data: Data, preprocessing: Preprocessing, tokenizer: Tokenizer
) -> tuple[Source, Source, int]:
    """What to train on, what to evaluate on, and how many rows of that."""
    if config.num_tokens < tokenizer.num_tokens:
        rule = (
            "to train on bytes: 256, BOS and EOS" if tokenizer.num_tokens == tokens.NUM_TOKENS else "for the tokenizer"
        )
        raise ValueError(f"num_tokens={config.num_tokens} must be at least {tokenizer.num_tokens} {rule}")
    if data.data != DIGITS:
        source, rows = load_data(
            data, config, preprocessing, tokenizer, seed=training.seed, max_held_out=training.eval_images
        )
        return source, rows, min(len(rows), training.eval_images)
    train_scans, held_out_scans = digits.load_scans()
    scenes = partial(digits.Scenes, config=config, tokenizer=tokenizer)
    return (
        scenes(train_scans, block=training.batch_size, seed=training.seed, jitter=training.jitter),
        scenes(held_out_scans, block=training.eval_images, seed=0),
        training.eval_images,
    )


def _check_fingerprints(fingerprints: dict[str, str], data: Data, run: Run) -> None:
    before = run.training()
    for name, fingerprint in fingerprints.items():
        if before.get(name, fingerprint) != fingerprint:
            raise DataError(
                f"data={data.data} has not the {name.removesuffix('_fingerprint')} that {run.folder} began with: a run "
                "goes on with the same data; restore them, or begin a new run"
            )


def _count_rows(progress: Progress, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        progress.rows += batch.rows
        for defect in batch.defects[: batch.new_defects]:
            progress.skipped[defect.reason] = progress.skipped.get(defect.reason, 0) + 1


def _so_far(progress: Progress, run: Run) -> str:
    return f"after step {progress.step}: lower it; {run.folder} keeps the weights from before"


def _not_finite(loss: float, norm: float, names: list[str], progress: Progress, training: Training, run: Run) -> str:
    value = f"loss of {loss}" if not math.isfinite(loss) else f"gradient norm of {norm}"
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return (
        f"lr={training.lr} led to a {value} at step {progress.step + 1}, batch {shown}: lower it; {run.folder} keeps "
        f"the last good weights, and all names in {METRICS}"
    )
