"""Train on CPUs: `python -m tests.captioner.training.process {ddp|fsdp2} train ...`, as torchrun starts it.

`forked` is the same in a process that is forked after the imports, which take longer than the training.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import palme_xt.cli.train  # noqa: F401  # as in a real process, before there is a group of processes
from palme_xt.cli import main


def shard() -> None:
    """Let accelerate shard on CPUs.

    `accelerate launch --use_fsdp` requests it by environment variables, which accelerate 1.15 respects only on
    accelerators. Its code and torch's run on gloo unchanged.
    """
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Attention,FeedForward",
    }
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)


def interrupt_the_second_at_step_3() -> None:
    """Send a signal in the middle of a step, to one process only."""
    step = torch.optim.AdamW.step
    steps = iter(range(1, 100))

    def step_and_signal(*arguments: Any, **keywords: Any) -> Any:
        if next(steps) == 3 and PartialState().process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **keywords)

    torch.optim.AdamW.step = step_and_signal  # type: ignore[method-assign]


def threads_of_gloo() -> list[str]:
    """Return the names of gloo's threads. A thread that outlives the interpreter may abort or hang the process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def run(how: str, *arguments: str) -> int | str:
    """Run the command line, and return the exit code, or an error."""
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    if how == "fsdp2":
        shard()
    if arguments[0] == "interrupted":
        interrupt_the_second_at_step_3()
        arguments = arguments[1:]
    code = main(list(arguments))
    # After sharding, the threads stay: torch 2.13 has caches that hold the group, and no public way to clear them.
    if how == "ddp" and (left := threads_of_gloo()):
        return f"threads of gloo are left: {left}"
    return code


def forked(environment: Mapping[str, str], out: Path, err: Path, how: str, *arguments: str) -> None:
    """Run the command line in this process, and end it, with what is printed in files."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in (1, out), (2, err):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    warnings.simplefilter("ignore")
    sys.exit(run(how, *arguments))


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
