"""Create the initial state of a training run, and compute the gradients of one step."""

import contextlib
import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from palme_xt.captioner.data.batches import Batch
from palme_xt.captioner.options import Training
from palme_xt.captioner.training.checkpoint import State
from palme_xt.captioner.training.distributed import Errors, TrainingError
from palme_xt.captioner.training.run import METRICS, Run
from palme_xt.captioner.training.task import Task
from palme_xt.config import PalmEConfig
from palme_xt.model import PalmE
from palme_xt.storage.folder import load_weights

NAMES_SHOWN = 8


def warm_up_and_decay(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step`: linear over the first tenth, then half a cosine."""
    warm_up = steps // 10
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def initial_state(accelerator: Accelerator, config: PalmEConfig, training: Training) -> State:
    """Return a new model with its optimizer and schedule, the same in all processes, and seed their generators.

    Raises:
        FolderError: If the folder `training.start` does not have weights of such a model.
    """
    set_seed(training.seed)
    model = PalmE.from_config(config)
    if training.start is not None:
        load_weights(model, training.start)
    weights, decay = [weight for weight in model.parameters() if weight.requires_grad], training.weight_decay
    optimizer = torch.optim.AdamW(weights, lr=training.lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_decay(step, training.steps))
    trained, optimizer = accelerator.prepare(model, optimizer)
    set_seed(training.seed, device_specific=True)
    return State(accelerator, trained, optimizer, schedule)


def compute_gradients(task: Task, state: State, run: Run, micro_batches: Sequence[Batch], targets: int) -> float:
    """Compute the gradients of the mean loss over the targets of all processes, clip them, and return that loss.

    Call it in all processes. If the loss or the gradient is not finite, the names of the batch go to `metrics.jsonl`.

    Raises:
        TrainingError: If the loss or the gradient is not finite, or `DistributedDataParallel` would wait for gradients
            that never come.
    """
    accelerator, losses = state.accelerator, []
    for batch in micro_batches:
        with contextlib.nullcontext() if batch is micro_batches[-1] else accelerator.no_sync(state.model):
            img, text = batch.img.to(accelerator.device), batch.text.to(accelerator.device)
            loss = state.model(task.preprocessing.normalise(img), text)
            # Processes average their gradients. With this weight, they get the gradient of the mean over all targets.
            accelerator.backward(loss * (batch.targets * accelerator.num_processes / targets))
            losses.append(loss.detach() * (batch.targets / targets))
    _check_all_have_gradients(state.model)
    mean = float(accelerator.reduce(torch.stack(losses).sum()))
    norm = float(accelerator.clip_grad_norm_(state.model.parameters(), task.training.grad_clip))
    if not (math.isfinite(mean) and math.isfinite(norm)):
        step = state.progress.step + 1
        names = gather_object([name for batch in micro_batches for name in batch.names])
        with Errors().shared():
            if accelerator.is_main_process:
                run.log(step=step, loss=mean, gradient_norm=norm, batch=names)
            value = f"gradient norm of {norm}" if math.isfinite(mean) else f"loss of {mean}"
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            where = f"at step {step}, batch {', '.join(names[:NAMES_SHOWN])}{more}"
            keeps = f"{run.folder} keeps the last good weights, and {METRICS} lists all names"
            raise TrainingError(f"lr={task.training.lr} led to a {value} {where}: lower it; {keeps}")
    return mean


def _check_all_have_gradients(model: nn.Module) -> None:
    weights = model.module.named_parameters() if isinstance(model, DistributedDataParallel) else ()
    if names := [name for name, weight in weights if weight.requires_grad and weight.grad is None]:
        rule = "train in one process, or without the option that leaves them unused, such as vit_kwargs.num_classes"
        found = f"{names[0]} and {len(names) - 1} more parameters get no gradient"
        raise TrainingError(f"{found}, and data-parallel processes wait for them: {rule}")
