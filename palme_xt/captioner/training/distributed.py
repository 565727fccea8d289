"""The processes of a training: what starts them, what they may be told, and how they end together."""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from palme_xt.captioner.options import PRECISIONS
from palme_xt.config import PalmEConfig

REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class TrainingError(ValueError):
    """A training that cannot start, or cannot go on."""


@contextlib.contextmanager
def ended(accelerator: Accelerator) -> Iterator[None]:
    """End trackers and processes after what is done with `accelerator`, whether it fails or not.

    The model goes before the group of processes. In torch 2.9 to 2.13, `DistributedDataParallel` keeps a group alive
    that is destroyed; ended with it, the threads of gloo are waited for without releasing the lock of the interpreter,
    which they may need; or they outlive the interpreter and abort the process (github.com/pytorch/pytorch/pull/179291).
    """
    try:
        yield
    except BaseException as error:
        if accelerator.num_processes > 1:
            traceback.clear_frames(error.__traceback__)  # whose variables hold the model
        raise
    finally:
        accelerator.free_memory()
        accelerator.end_training()


def make_accelerator(mixed_precision: str | None, log_with: str | None, logs: Path, config: PalmEConfig) -> Accelerator:
    """The accelerator of this process, as `accelerate launch` and the arguments say.

    Args:
        mixed_precision: `no` or `bf16`; None: what `accelerate launch` was told.
        log_with: a tracker, or `all`.
        logs: folder for trackers.
        config: of the model that is to be trained.

    Raises:
        TrainingError: a tracker that is not there, or a way to train that would go wrong, early or silently.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`log_with=")  # an error, below
            accelerator = Accelerator(mixed_precision=mixed_precision, log_with=log_with, project_dir=logs)
    except ValueError as error:
        raise TrainingError(f"accelerate refuses: {error}") from error
    if accelerator.gradient_accumulation_steps != 1:
        raise TrainingError(
            f"--gradient_accumulation_steps {accelerator.gradient_accumulation_steps} of accelerate launch has no "
            "effect: give it to palme-xt train"
        )
    if log_with and not accelerator.log_with:
        raise TrainingError(
            "log_with=all finds no tracker: pip install tensorboard, say"
            if log_with == "all"
            else f"log_with={log_with} is not installed: pip install {log_with}"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        backend = accelerator.state.dynamo_plugin.backend.value.lower()
        raise TrainingError(
            f"--dynamo_backend {backend} of accelerate launch must be no: compiled models cannot be resumed"
        )
    if accelerator.mixed_precision not in PRECISIONS:
        raise TrainingError(
            f"--mixed_precision {accelerator.mixed_precision} of accelerate launch must be one of {PRECISIONS}"
        )
    if accelerator.distributed_type in REFUSED:
        raise TrainingError(f"{accelerator.distributed_type} must be data-parallel or FSDP2: leave it out")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise TrainingError("--use_fsdp must come with --fsdp_version 2: the first version is not supported")
        # accelerate 1.15: sharding after a detour over the meta device, which `accelerate launch` asks for, crashes at
        # persistent buffers, as rotary positions have.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise TrainingError("--use_fsdp has no effect on CPUs, where accelerate does not shard: leave it out")
    for part in "encoder_kwargs", "decoder_kwargs":
        if accelerator.num_processes > 1 and getattr(config, part).get("layer_dropout"):
            raise TrainingError(
                f"{part}['layer_dropout']={getattr(config, part)['layer_dropout']} must be 0 with "
                f"{accelerator.num_processes} processes: each would drop other layers, and wait for the others"
            )
    return accelerator


def start_trackers(accelerator: Accelerator, described: Mapping[str, Any], step: int) -> None:
    """Start the trackers of a run of which `step` steps are done; TensorBoard forgets those that are done again."""
    values = {name: value for name, value in described.items() if value is not None}
    accelerator.init_trackers("palme_xt", values, {"tensorboard": {"purge_step": step + 1} if step else {}})


def refuse_parameters_without_gradient(model: nn.Module) -> None:
    """To be called after a backward pass, the gradients of which were not yet reset.

    Raises:
        TrainingError: `DistributedDataParallel` would wait for gradients that never come, and fail at the next step.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    names = [name for name, weight in model.module.named_parameters() if weight.requires_grad and weight.grad is None]
    if names:
        raise TrainingError(
            f"{names[0]} and {len(names) - 1} more parameters get no gradient, and data-parallel processes wait for "
            "them: train in one process, or without the option that leaves them unused, such as vit_kwargs.num_classes"
        )


class Errors:
    """Errors of any process, which end all of them: one that ends alone leaves the others waiting."""

    def __init__(self) -> None:
        self.mine: Exception | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold an error of the user's until all processes `meet`."""
        try:
            yield
        except (ValueError, TypeError, OSError) as error:
            self.mine = self.mine or error

    def meet(self) -> None:
        """Raise the first error that any process holds; to be called in all of them."""
        found: list[Exception] = [error for error in gather_object([self.mine]) if error is not None]
        if found:
            error = self.mine or found[0]
            error.met = True  # type: ignore[attr-defined]  # so the first process tells of it
            raise error
