"""Create the state of a training run, and save it to one safetensors file, so that a resumed run is bitwise equal."""

import json
import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import FSDPModule

from palme_xt.captioner import parts
from palme_xt.captioner.options import Training
from palme_xt.captioner.training.distributed import Errors, in_first_process
from palme_xt.captioner.training.run import Run
from palme_xt.config import PalmEConfig
from palme_xt.model import PalmE
from palme_xt.storage.files import explained
from palme_xt.storage.folder import FolderError, as_safetensors, load_weights

CHECKPOINT = "checkpoint.safetensors"
FORMAT = 1
METADATA = "state"


@dataclass
class Progress:
    """The progress of a training run.

    Attributes:
        step: Number of optimizer steps done, which determines the position in the data.
        rows: Number of rows read for the first time, by this process.
        skipped: Number of these rows that were skipped, by reason.
    """

    step: int = 0
    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class State:
    """Everything that changes in the course of a training run.

    Attributes:
        accelerator: The accelerator that prepared the model and the optimizer.
        model: The model, which may be wrapped or sharded.
        optimizer: The optimizer of the model's weights.
        schedule: The learning rate schedule.
        progress: The progress of the run.
        random_states: The states of this process's generators after `progress.step` steps.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    progress: Progress = field(default_factory=Progress)
    random_states: dict[str, Tensor] = field(default_factory=dict)


def warm_up_and_decay(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step`: linear over the first tenth, then half a cosine."""
    warm_up = steps // 10
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def initial_state(accelerator: Accelerator, config: PalmEConfig, training: Training, new: bool = True) -> State:
    """Return a new model with its optimizer and schedule, the same in all processes, and seed their generators.

    Args:
        accelerator: The accelerator of the processes.
        config: The model's arguments.
        training: How to train.
        new: Whether to load the weights to begin with. They may be gone when a run is resumed.

    Raises:
        FolderError: If the folder `training.start` does not have weights of such a model.
        ValueError: If a pretrained part cannot be loaded, or all parts are frozen.
    """
    set_seed(training.seed)
    model = PalmE.from_config(config)
    if new and training.start is not None:
        load_weights(model, training.start)
    if new:
        parts.load(model, training)
    parts.freeze(model, training)
    # With FSDP, all processes have to call the encoder together.
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if "encoder" in training.frozen and not (training.augment or sharded):
        model.encode = parts.Features(model)  # type: ignore[method-assign]
    weights, decay = parts.groups(model, training), training.weight_decay
    optimizer = torch.optim.AdamW(weights, lr=training.lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_decay(step, training.steps))
    trained, optimizer = accelerator.prepare(model, optimizer)
    set_seed(training.seed, device_specific=True)
    return State(accelerator, trained, optimizer, schedule)


def random_state() -> dict[str, Tensor]:
    """Return the states of all generators that a model may draw from: torch's, the device's and Python's."""
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
    """Set all generators to what `random_state` returned."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), *(states["python.gauss"].tolist() or [None])))
    if "device" in states and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(states["device"])


def total_progress(progress: Progress) -> Progress:
    """Return the total progress of all processes, each of which counts its own rows. Call it in all processes."""
    gathered: list[Progress] = gather_object([progress])
    skipped = sum((each.skipped for each in gathered), Counter[str]())
    return Progress(progress.step, sum(each.rows for each in gathered), skipped)


def full_weights(model: nn.Module) -> dict[str, Any]:
    """Return the unsharded weights in all processes. Call it in all processes."""
    return state_dict.get_model_state_dict(model, options=state_dict.StateDictOptions(full_state_dict=True))


def unsharded(model: PalmE, weights: dict[str, Tensor]) -> PalmE:
    """Return `model`, or, if it is sharded, a copy with these weights that each process can run on its own."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.random.fork_rng(devices=[]):
        copy = PalmE.from_config(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy.to(next(iter(weights.values())).device)


def save(run: Run, state: State) -> None:
    """Replace the checkpoint of `run` with `state`. Call it in all processes.

    Raises:
        FolderError: If the checkpoint cannot be written. The previous one is unchanged.
    """
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = cast(Any, state_dict.get_state_dict(state.model, state.optimizer, options=options))
    progress, random_states = total_progress(state.progress), gather_object([state.random_states])
    parts = {"model": weights}
    parts |= {f"optimizer.{name}": values for name, values in moments.get("state", {}).items()}
    parts |= {f"random.{process}": states for process, states in enumerate(random_states)}
    tensors = {f"{part}.{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
    schedule, groups = state.schedule.state_dict(), moments.get("param_groups")
    metadata = {"format": FORMAT, "progress": vars(progress), "schedule": schedule, "param_groups": groups}
    # Write one entry, because safetensors writes several in any order, and equal states must give equal files.
    content = as_safetensors(tensors, {METADATA: json.dumps(metadata)})
    in_first_process(state.accelerator, run.write, {CHECKPOINT: content})


def load(run: Run, state: State) -> None:
    """Set `state`, and the generators of all processes, to the checkpoint of `run`. Call it in all processes.

    If the run ended before its first checkpoint, nothing changes. Only the first process reads the file. The checkpoint
    has random states for as many processes as wrote it; any further process keeps its own.

    Raises:
        FolderError: If the file is damaged, or belongs to another model.
    """
    main, path = state.accelerator.is_main_process, run.folder / CHECKPOINT
    metadata, tensors, moments = None, dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    with Errors().shared():
        if main and path.is_file():
            metadata, tensors = _read(path)
    for name, tensor in _below("optimizer", tensors).items():
        parameter, _, key = name.rpartition(".")
        moments.setdefault(parameter, {})[key] = tensor
    metadata, random_states, trained = broadcast_object_list([metadata, _below("random", tensors), list(moments)])
    if metadata is None:
        return
    optimizer = {"state": moments, "param_groups": metadata["param_groups"]} if main else {}
    several = state.accelerator.num_processes > 1
    options = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    try:
        state_dict.set_model_state_dict(state.model, _below("model", tensors), options=options)
        options.strict = False  # parameters without a gradient have no state
        state_dict.set_optimizer_state_dict(state.model, state.optimizer, optimizer, options=options)
        # torch 2.9 to 2.13 also creates a state, as after one step, for parameters that have not had a gradient yet.
        for name, weight in state.model.named_parameters():
            if name.removeprefix("module.") not in trained:
                state.optimizer.state.pop(weight, None)
        state.schedule.load_state_dict(metadata["schedule"])
        # The checkpoint has the learning rate for the number of steps that the run had when it was written.
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * state.schedule.lr_lambdas[0](state.schedule.last_epoch)
    except (RuntimeError, KeyError, ValueError) as error:
        raise FolderError(f"{path} does not belong to this model: {str(error).splitlines()[0]}") from error
    if own := _below(f"{state.accelerator.process_index}", random_states):
        set_random_state(own)
    done = metadata["progress"]  # before version 0.2, it also has a "metrics_size"
    state.progress.step = done["step"]
    if main:  # the first process counts on from the total, the others from 0
        state.progress.rows, state.progress.skipped = done["rows"], Counter(done["skipped"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and the tensors of a checkpoint."""
    with explained(f"{path} cannot be read as a checkpoint", FolderError), safetensors.safe_open(path, "pt") as file:
        metadata = json.loads((file.metadata() or {})[METADATA])
        if metadata["format"] != FORMAT:
            raise ValueError(f"format={metadata['format']} must be {FORMAT}: resume with the version that wrote it")
        return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors whose names begin with `prefix` and a dot, by the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
