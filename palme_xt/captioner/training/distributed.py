"""Start the processes of a training run, share their errors, and shut them down."""

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, gather_object

from palme_xt.captioner.options import PRECISIONS, Training
from palme_xt.config import PalmEConfig
from palme_xt.storage.files import explained


class TrainingError(ValueError):
    """Raised if training cannot start or cannot continue."""


@contextlib.contextmanager
def shutdown_on_exit(accelerator: Accelerator) -> Iterator[None]:
    """Shut down trackers and processes on exit, whether there was an error or not.

    The model must be freed before the process group is destroyed. In torch 2.9 to 2.13, `DistributedDataParallel` keeps
    a destroyed group alive; if both are freed together, the threads of gloo are joined without releasing the
    interpreter's lock, which they may need, or they outlive the interpreter and abort the process
    (github.com/pytorch/pytorch/pull/179291).
    """
    try:
        yield
    except BaseException as error:
        if accelerator.num_processes > 1:
            traceback.clear_frames(error.__traceback__)  # their variables hold the model
        raise
    finally:
        accelerator.free_memory()
        accelerator.end_training()


def make_accelerator(training: Training, logs: Path, config: PalmEConfig) -> Accelerator:
    """Return the accelerator of this process, according to `accelerate launch` and the arguments.

    Args:
        training: The options, for the precision and the tracker.
        logs: The folder of the tracker.
        config: The model to train.

    Raises:
        TrainingError: If the tracker is not installed, or training would fail later or go wrong silently.
    """
    precision, log_with = training.mixed_precision, training.log_with
    with explained("accelerate rejects the options", TrainingError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`log_with=")  # raised as an error below
        accelerator = Accelerator(mixed_precision=precision, log_with=log_with, project_dir=logs)
    if problem := next(_problems(accelerator, training, config), None):
        raise TrainingError(problem)
    if accelerator.distributed_type == DistributedType.FSDP:
        # accelerate 1.15: sharding by way of the meta device, which `accelerate launch` requests, crashes with
        # persistent buffers, such as those of rotary positions.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return accelerator


def _problems(accelerator: Accelerator, training: Training, config: PalmEConfig) -> Iterator[str]:
    """Yield why training would fail later or go wrong silently."""
    launch, processes, kind = "of accelerate launch", accelerator.num_processes, accelerator.distributed_type
    if (started := os.environ.get("WORLD_SIZE", f"{processes}")) != f"{processes}":
        found = f"WORLD_SIZE={started} processes were started, but accelerate counts {processes}"
        yield f"{found}: each would train the whole run in the same folder; on CPUs, set ACCELERATE_USE_CPU=true"
    if training.log_with and not accelerator.log_with:
        package = "tensorboard, for example" if training.log_with == "all" else training.log_with
        yield f"log_with={training.log_with} is not installed: pip install {package}"
    if (count := accelerator.gradient_accumulation_steps) != 1:
        yield f"--gradient_accumulation_steps {count} {launch} has no effect: pass it to palme-xt train"
    if (backend := accelerator.state.dynamo_plugin.backend) != DynamoBackend.NO:
        yield f"--dynamo_backend {backend.value.lower()} {launch} must be no: compiled models cannot be resumed"
    if accelerator.mixed_precision not in PRECISIONS:
        yield f"--mixed_precision {accelerator.mixed_precision} {launch} must be one of {PRECISIONS}"
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        yield f"{kind} is not supported: use data-parallel or FSDP2 processes"
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        yield "--use_fsdp must come with --fsdp_version 2: the first version is not supported"
    if kind != DistributedType.FSDP and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        yield "--use_fsdp has no effect on CPUs, where accelerate does not shard: leave it out"
    for part, options in ("encoder_kwargs", config.encoder_kwargs), ("decoder_kwargs", config.decoder_kwargs):
        if processes > 1 and (dropout := options.get("layer_dropout")):
            yield f"{part}['layer_dropout']={dropout} must be 0 with {processes} processes, which drop different layers"


class Errors:
    """User errors that end all processes, because a process that ends alone would leave the others waiting."""

    own: Exception | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold an error of this process until all processes `meet`."""
        try:
            yield
        except (ValueError, TypeError, OSError) as error:
            self.own = self.own or error

    def meet(self) -> None:
        """Raise the first error that any process holds. Call it in all processes."""
        found: list[Exception] = [error for error in gather_object([self.own]) if error is not None]
        if found:
            error = self.own or found[0]
            error.met = True  # type: ignore[attr-defined]  # the first process reports it for all
            raise error

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Raise an error of any process in all of them, at the end of the block. Enter it in all processes."""
        with self.held():
            yield
        self.meet()


def in_first_process(accelerator: Accelerator, function: Callable[..., object], *arguments: Any) -> None:
    """Call a function in the first process only, and raise its error in all processes. Call this in all of them."""
    with Errors().shared():
        if accelerator.is_main_process:
            function(*arguments)
