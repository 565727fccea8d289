"""The processes of a training: what starts them, what they may be told, and how they end together."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from palme_xt.config import PalmEConfig

REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
PRECISIONS = ("no", "bf16")


class TrainingError(ValueError):
    """A training that cannot start, or cannot go on."""


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
    accelerator.gradient_accumulation_steps = 1  # `accelerate launch` may say otherwise: the loop accumulates itself
    if log_with and not accelerator.log_with:
        raise TrainingError(f"log_with={log_with} is not installed: pip install {log_with}")
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
        if self.mine is not None:
            gather_object([self.mine])
            raise self.mine
        for error in gather_object([None]):
            if error is not None:
                raise error
