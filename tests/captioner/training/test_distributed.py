"""Many processes train what one process trains, from the same global batches."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState

from palme_xt.captioner.options import Training
from palme_xt.captioner.training.checkpoint import CHECKPOINT
from palme_xt.captioner.training.loop import _share
from palme_xt.captioner.training.run import Run
from palme_xt.cli import main
from tests.captioner.captioned import TINY, spoil, write_folder
from tests.captioner.training.process import forked
from tests.forks import FORKS
from tests.test_cli import fails

TOLERANCE = 1e-5
TRAIN = ["--steps=5", "--batch_size=8", "--save_every=2", "--eval_every=3", "--held_out=7", "--lr=1e-3", *TINY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return images of which some are broken, so that processes have batches of different sizes."""
    folder = write_folder(tmp_path_factory.mktemp("data") / "pictures", 31)
    spoil(folder)
    return folder


def environments() -> list[dict[str, str]]:
    """Return the environments of two processes that torchrun starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"}
    return [os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


Ended = tuple[list[int | None], str, str]


def launch(how: str, *arguments: str) -> Ended:
    """Start two processes as torchrun does, and return their exit codes, what they printed, and their errors."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.captioner.training.process", how, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for environment in environments()
    ]
    with ThreadPoolExecutor() as readers:
        printed = list(readers.map(subprocess.Popen.communicate, processes))
    return [process.returncode for process in processes], printed[0][0] + printed[1][0], printed[0][1] + printed[1][1]


def fork(how: str, *arguments: str) -> Ended:
    """Do what `launch` does with forks of a process that has imported everything. They do not exit as others do."""
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"out{rank}"), Path(folder, f"err{rank}")) for rank in range(2)]
        pairs = zip(environments(), files, strict=True)
        forks = [FORKS.Process(target=forked, args=(env, *each, how, *arguments)) for env, each in pairs]
        for each in forks:
            each.start()
        for each in forks:
            each.join()
        out, err = ("".join(path.read_text() for path in paths) for paths in zip(*files, strict=True))
    return [each.exitcode for each in forks], out, err


def train(how: str, *arguments: str, start: Callable[..., Ended] = fork) -> str:
    codes, out, err = start(how, "train", *arguments)
    assert codes == [0, 0], err[-3000:]
    return out


def differ(run: Path, other: Path, file: str = "model.safetensors") -> float:
    """Return the largest difference of any weight, or of any other tensor of `file`."""
    ours, theirs = (safetensors.torch.load_file(folder / file) for folder in (run, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours if ours[name].numel())


def losses(run: Path) -> torch.Tensor:
    lines = Run(run).metrics()
    names = "loss", "held_out_loss"
    return torch.tensor([line[name] for line in lines for name in names if name in line])


def progress(run: Path) -> Any:
    with safetensors.safe_open(str(run / CHECKPOINT), "pt") as file:
        return json.loads(file.metadata()["state"])["progress"]


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "alone"
    assert main(["train", f"--data={folder}", *TRAIN, f"--run={run}"]) == 0
    return run


@pytest.mark.parametrize(
    ("how", "options", "start"),
    [
        ("ddp", [], launch),
        pytest.param("ddp", ["--gradient_accumulation_steps=2"], fork, marks=pytest.mark.slow),
        pytest.param("fsdp2", ["--gradient_accumulation_steps=2"], launch, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_what_one_trains(
    how: str, options: list[str], start: Callable[..., Ended], folder: Path, alone: Path, tmp_path: Path
) -> None:
    out = train(how, f"--data={folder}", *TRAIN, *options, f"--run={tmp_path / 'run'}", start=start)
    assert (losses(tmp_path / "run") - losses(alone)).abs().max() < TOLERANCE
    assert differ(tmp_path / "run", alone) < TOLERANCE
    assert progress(tmp_path / "run") == progress(alone)
    assert sum(progress(alone)["skipped"].values()) >= 3
    assert out.count("run folder: ") == 1  # only the first process prints
    samples = [(tmp_path / "run" / name).stat().st_size for name in ("samples.png", "loss.png", "README.md")]
    assert all(samples)

    assert main(["train", f"--data={folder}", *TRAIN, "--seed=1", f"--run={tmp_path / 'other'}"]) == 0
    assert (losses(tmp_path / "other") - losses(alone)).abs().max() > 100 * TOLERANCE
    assert differ(tmp_path / "other", alone) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_many_processes_resume_bitwise(how: str, folder: Path, tmp_path: Path) -> None:
    options = [f"--data={folder}", *TRAIN, "--streaming", "--decoder_kwargs.attn_dropout=0.2"]
    train(how, *options, f"--run={tmp_path / 'whole'}")
    # After a signal to one of them, both stop after the same step.
    codes, _, err = fork(how, "interrupted", "train", *options, f"--run={tmp_path / 'told'}")
    assert codes == [130, 130], err[-3000:]
    assert progress(tmp_path / "told")["step"] == 3
    train(how, f"--resume={tmp_path / 'told'}")
    assert differ(tmp_path / "told", tmp_path / "whole", CHECKPOINT) == 0
    assert losses(tmp_path / "told").equal(losses(tmp_path / "whole"))
    assert progress(tmp_path / "told") == progress(tmp_path / "whole")
    assert differ(tmp_path / "told", tmp_path / "whole", "model.safetensors") == 0


@pytest.mark.slow
def test_two_processes_share_a_stream(folder: Path, tmp_path: Path) -> None:
    options = [f"--data={folder}", *TRAIN, "--streaming", "--shuffle_buffer=9", "--lr=2e-4", "--augment"]
    assert main(["train", *options, f"--run={tmp_path / 'alone'}"]) == 0
    train("ddp", *options, "--num_workers=1", f"--run={tmp_path / 'run'}")
    assert (losses(tmp_path / "run") - losses(tmp_path / "alone")).abs().max() < TOLERANCE
    assert differ(tmp_path / "run", tmp_path / "alone") < TOLERANCE
    assert progress(tmp_path / "run") == progress(tmp_path / "alone")
    assert progress(tmp_path / "run")["rows"] == 24


def test_parameters_without_gradient_are_refused(folder: Path, tmp_path: Path) -> None:
    options = [f"--data={folder}", *TRAIN, "--vit_kwargs.num_classes=3", f"--run={tmp_path / 'run'}"]
    codes, _, err = launch("ddp", "train", *options)
    assert codes == [2, 2]
    message = r"palme-xt: error: encoder\.\S+ and \d+ more parameters get no gradient, and data-parallel .*"
    assert [line for line in err.splitlines() if "palme-xt" in line and re.search(message, line)], err
    assert "Traceback" not in err


def test_errors_that_processes_do_not_share_are_told_by_each_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, local, told in ("0", "0", ""), ("8", "0", r" \(process 8\)"), ("9", "1", None):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert main(["train", f"--resume={tmp_path}"]) == 2
        err = capsys.readouterr().err
        assert err == "" if told is None else re.fullmatch(rf"palme-xt: error: .* is not a run folder: .*{told}\n", err)


def test_accelerate_launch_starts_processes(folder: Path, alone: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--quiet"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    options = ["-m", "palme_xt", "train", f"--data={folder}", *TRAIN, f"--run={tmp_path / 'run'}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert differ(tmp_path / "run", alone) < TOLERANCE


def test_sharding_that_accelerate_would_leave_out_silently(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` sets it
    message = "--use_fsdp has no effect on CPUs, where accelerate does not shard: leave it out"
    fails(capsys, ["train", f"--data={folder}", *TRAIN, f"--run={tmp_path / 'run'}"], message)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "eager", "--dynamo_backend eager of accelerate launch must be no: .*"),
        ("WORLD_SIZE", "2", "WORLD_SIZE=2 processes were started, but accelerate counts 1: .* ACCELERATE_USE_CPU=true"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "--gradient_accumulation_steps 4 of accelerate launch has no effect: pass it to palme-xt train",
        ),
    ],
)
def test_what_accelerate_launch_may_not_say(
    variable: str,
    value: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    AcceleratorState._reset_state()
    try:
        fails(capsys, ["train", f"--data={folder}", *TRAIN, f"--run={tmp_path / 'run'}"], message)
    finally:
        AcceleratorState._reset_state()


@pytest.mark.slow
def test_bfloat16_is_near_float32(folder: Path, alone: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "palme_xt", "train", f"--data={folder}", *TRAIN, "--mixed-precision=bf16"]
    done = subprocess.run([*command, f"--run={tmp_path / 'run'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    difference = (losses(tmp_path / "run") - losses(alone)).abs().max()
    assert 1e-5 < difference < 0.05
    weights = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(("batch_size", "count"), [(3, 1), (6, 2)])
def test_batches_that_cannot_be_shared(batch_size: int, count: int) -> None:
    two = SimpleNamespace(num_processes=2, process_index=1)
    given = Training(batch_size=batch_size, gradient_accumulation_steps=count)
    message = f"batch_size={batch_size} must be divisible by 2 processes times gradient_accumulation_steps={count}: it"
    with pytest.raises(ValueError, match=message):
        _share(given, two)
    assert _share(Training(batch_size=8, gradient_accumulation_steps=2), two)(3) == range(14, 16)
