"""Everything a training needs to go on as if it had never stopped, in one safetensors file."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from palme_xt.captioner.training.distributed import Errors
from palme_xt.captioner.training.run import Run, RunError

CHECKPOINT = "checkpoint.safetensors"
FORMAT = 1
STATE = "state"


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: optimizer steps done; the position in the data follows from it.
        rows: rows read for the first time, and
        skipped: how many of them were skipped, by reason.
        metrics_size: bytes of `metrics.jsonl` that belong to these steps.
    """

    step: int = 0
    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    metrics_size: int = 0


def random_state() -> dict[str, Tensor]:
    """The states of all generators that a model may draw from in this process: torch's, the device's and Python's."""
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.accelerator.is_available():
        states["device"] = torch.get_device_module().get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), *(states["python.gauss"].tolist() or [None])))
    if "device" in states and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(states["device"])


def of_all_processes(progress: Progress) -> Progress:
    """The progress of all processes: each counts the rows that it reads itself."""
    total = replace(progress, rows=0, skipped={})
    for each in gather_object([progress]):
        total.rows += each.rows
        for reason, count in each.skipped.items():
            total.skipped[reason] = total.skipped.get(reason, 0) + count
    return total


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights, unsharded, in all processes; to be called in all of them."""
    return cast(dict[str, Tensor], get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def save_checkpoint(
    run: Run,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress,
    random_states: dict[str, Tensor],
) -> None:
    """Replace the checkpoint of `run` by the present state; to be called in all processes.

    Args:
        random_states: of this process, as they were when `progress.step` steps were done.

    Raises:
        RunError: it cannot be written; the one before is as it was.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    weights = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    progress = of_all_processes(progress)
    states = gather_object([random_states])
    if not accelerator.is_main_process:
        return
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    for name, state in moments["state"].items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    tensors |= {f"random.{number}.{name}": state for number, each in enumerate(states) for name, state in each.items()}
    values = {
        "format": FORMAT,
        "progress": vars(progress),
        "schedule": schedule.state_dict(),
        "param_groups": moments["param_groups"],
    }
    # One entry, because safetensors writes several in any order: the same state is the same file.
    run.write_tensors(CHECKPOINT, tensors, {STATE: json.dumps(values)})


def load_checkpoint(
    run: Run,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> Progress:
    """Put the state of `run`'s checkpoint into model, optimizer, schedule and generators, in all processes.

    Only the first process reads the file. Random states are those of as many processes as there were; with more, the
    others keep theirs.

    Returns:
        How far the training was; nowhere, if it ended before the first checkpoint.

    Raises:
        RunError: the file is damaged, or of another model.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "random": {}}
    values: dict[str, Any] | None = None
    path = run.folder / CHECKPOINT
    errors = Errors()
    with errors.held():
        if accelerator.is_main_process and path.is_file():
            values = _read(path, parts)
    errors.meet()
    moments: dict[str, Any] = {}
    if values is not None:
        moments = {"state": {}, "param_groups": values["param_groups"]}
        for name, value in parts["optimizer"].items():
            parameter, _, key = name.rpartition(".")
            moments["state"].setdefault(parameter, {})[key] = value
    values, randoms, learned = broadcast_object_list([values, parts["random"], list(moments.get("state", {}))])
    if values is None:
        return Progress()
    try:
        set_model_state_dict(model, parts["model"], options=options)
        set_optimizer_state_dict(model, optimizer, moments, options=replace(options, strict=False))
        # torch 2.9 to 2.13 makes a state, of one step done, also for parameters that had no gradient yet.
        for name, weight in model.named_parameters():
            if name.removeprefix("module.") not in learned:
                optimizer.state.pop(weight, None)
        schedule.load_state_dict(values["schedule"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise RunError(f"{path} is not of this model: {str(error).splitlines()[0]}") from error
    mine = f"{accelerator.process_index}."
    if states := {name.removeprefix(mine): state for name, state in randoms.items() if name.startswith(mine)}:
        set_random_state(states)
    progress = Progress(**values["progress"])
    # Rows are counted where they are read: those of before are counted in the first process from here on.
    return progress if accelerator.is_main_process else replace(progress, rows=0, skipped={})


def _read(path: Path, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            values: dict[str, Any] = json.loads((file.metadata() or {})[STATE])
        for name, tensor in load_file(path).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        format_ = values["format"]
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is no checkpoint that can be read: {error}") from error
    if format_ != FORMAT:
        raise RunError(f"{path} is of format {format_}, must be {FORMAT}: resume with the version it is from")
    return values
