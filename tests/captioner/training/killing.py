"""Kill real training processes with SIGKILL at random moments, resume each, and compare the results bit by bit.

Run it as `python -m tests.captioner.training.killing FOLDER DATA KILLS`.
It imports everything once and then forks each training process. The process of the tests must not fork them itself,
because it has computed gradients.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import palme_xt.cli.train  # noqa: F401  # imported before the forks
from palme_xt.captioner.training.checkpoint import CHECKPOINT
from palme_xt.captioner.training.run import Run
from palme_xt.cli import main
from palme_xt.storage.files import UNFINISHED
from tests.captioner.captioned import TINY

STEPS = 12
OPTIONS = [
    *(f"--steps={STEPS}", "--batch_size=4", "--save_every=2", "--eval_every=6", "--held_out=6", "--eval_images=2"),
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


def killed_at(run: Path, train: list[str], lines: int, delay: float, while_writing: bool) -> bool:
    """Start a run and kill it once it has logged some lines. Return whether it was killed where it should be.

    It may end before the signal, or finish what it is writing: machines differ in speed.
    """
    pid = start([*train, f"--run={run}"])
    while lines_of(run) < lines and alive(pid):
        time.sleep(0.001)
    if not while_writing:
        time.sleep(delay)
    else:
        while not (run / UNFINISHED).exists() and alive(pid):
            pass
    died = kill(pid)
    return died and (run / "config.json").exists() and (not while_writing or (run / UNFINISHED).exists())


def alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def lines_of(run: Path) -> int:
    """Return how many lines of metrics a run has logged."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


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
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def kill_and_resume(folder: Path, data: str, kills: int) -> None:
    train = ["train", f"--data={data}", *TINY, *OPTIONS]
    duration = finish([*train, f"--run={folder / 'whole'}"])
    expected = end_of(folder / "whole")
    finish([*train, f"--run={folder / 'other'}", "--seed=1"])
    if expected["metrics"] == end_of(folder / "other")["metrics"]:
        raise SystemExit("another seed gives the same: nothing is compared")
    moments = random.Random(0)
    steps = set()
    for number in range(kills):
        run = folder / str(number)
        while_writing = number % 4 == 0
        while not killed_at(run, train, moments.randrange(STEPS), moments.uniform(0, duration / STEPS), while_writing):
            shutil.rmtree(run)
        steps.add(lines_of(run))
        if number % 2:  # kill half of them again
            pid = start(["train", f"--resume={run}"])
            time.sleep(moments.uniform(0, 0.6 * duration))
            kill(pid)
        finish(["train", f"--resume={run}"])
        found = end_of(run)
        for name in expected | found:
            if expected.get(name) != found.get(name):
                raise SystemExit(f"kill {number}: {name} differs")
    sys.stdout.write(json.dumps({"moments": len(steps)}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    kill_and_resume(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
