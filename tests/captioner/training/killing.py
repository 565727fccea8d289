"""Kill real training processes with SIGKILL at random moments, resume each, and compare the results bit by bit.

Run it as `python -m tests.captioner.training.killing FOLDER DATA KILLS`.
It imports everything once and then forks each training process. The process of the tests must not fork them itself,
because it has computed gradients.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from palme_xt.captioner.training import loop as training  # noqa: F401  # imported before the forks
from palme_xt.captioner.training.checkpoint import CHECKPOINT
from palme_xt.captioner.training.run import Run
from palme_xt.cli import main
from palme_xt.storage.atomic import UNFINISHED
from tests.captioner.captioned import TINY

STEPS = 12
OPTIONS = [
    *(f"--steps={STEPS}", "--batch_size=4", "--save_every=2", "--eval_every=5", "--held_out=6"),
    # The results depend on Python's generator and on torch's.
    *("--decoder_kwargs.layer_dropout=0.2", "--decoder_kwargs.attn_dropout=0.1"),
]


def start(arguments: list[str]) -> int:
    """Fork a process that runs the command line, and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        os._exit(main(arguments))
    finally:
        os._exit(99)


def finish(arguments: list[str]) -> float:
    """Run the command line to its end, and return how many seconds it took."""
    started = time.monotonic()
    _, status = os.waitpid(start(arguments), 0)
    if status:
        raise SystemExit(f"{arguments} ended with {status}")
    return time.monotonic() - started


def wait_for(path: Path, times: int, pid: int) -> None:
    """Wait until the file has appeared the given number of times, or the process has ended."""
    for _ in range(times):
        while path.exists() and os.waitpid(pid, os.WNOHANG) == (0, 0):
            pass
        while not path.exists():
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                return


def end_of(run: Path) -> dict[str, Any]:
    """Return all results of a run, except for its speed."""
    metrics = Run(run).metrics()
    for line in metrics:
        line.pop("images_per_second", None)
    content = (run / CHECKPOINT).read_bytes()
    tensors = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:tensors])
    state = json.loads(header.pop("__metadata__")["state"])
    end = {"metrics": metrics, "header": header, "state": state, "tensors": content[tensors:]}
    names = [path for path in run.rglob("*") if path.is_file() and path.name not in ("metrics.jsonl", CHECKPOINT)]
    return end | {str(path.relative_to(run)): path.read_bytes() for path in sorted(names)}


def kill(pid: int) -> bool:
    """Kill a process, unless it has ended, and return whether it was killed."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    return False


def kill_and_resume(folder: Path, data: str, kills: int) -> None:
    train = ["train", f"--data={data}", *TINY, *OPTIONS]
    duration = finish([*train, f"--run={folder / 'whole'}"])
    expected = end_of(folder / "whole")
    finish([*train, f"--run={folder / 'other'}", "--seed=1"])
    if expected["metrics"] == end_of(folder / "other")["metrics"]:
        raise SystemExit("another seed gives the same: nothing is compared")
    moments = random.Random(0)
    while_writing = died = 0
    steps = set()
    for number in range(kills):
        run = folder / str(number)
        pid = start([*train, f"--run={run}"])
        while not (run / "config.json").exists():
            time.sleep(0.001)
        if number % 4:
            time.sleep(moments.uniform(0, 0.6 * duration))
        else:  # in the middle of writing
            wait_for(run / UNFINISHED, moments.randint(1, STEPS // 2), pid)
        died += kill(pid)
        while_writing += (run / UNFINISHED).exists()
        steps.add(len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0)
        if number % 2:  # kill half of them again
            pid = start(["train", f"--resume={run}"])
            time.sleep(moments.uniform(0, 0.6 * duration))
            kill(pid)
        finish(["train", f"--resume={run}"])
        found = end_of(run)
        for name in expected | found:
            if expected.get(name) != found.get(name):
                raise SystemExit(f"kill {number}: {name} differs")
    sys.stdout.write(json.dumps({"died": died, "while_writing": while_writing, "moments": len(steps)}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    kill_and_resume(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
