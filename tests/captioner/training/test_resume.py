"""Whatever stops a run, it resumes to a bitwise equal result, or explains why it cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from palme_xt import PalmE
from palme_xt.captioner.training import checkpoint
from palme_xt.captioner.training import loop as training
from palme_xt.captioner.training.checkpoint import CHECKPOINT, random_state, set_random_state
from palme_xt.captioner.training.run import LOCK, Run
from palme_xt.cli import main
from palme_xt.storage.files import UNFINISHED
from tests.captioner.captioned import TINY, write_folder
from tests.captioner.training.killing import end_of
from tests.test_cli import fails

DROPOUT = ["--decoder_kwargs.layer_dropout=0.3", "--decoder_kwargs.attn_dropout=0.2"]
SHORT = ["--steps=7", "--batch_size=4", "--save_every=2", "--eval_every=3", "--held_out=6", *TINY]
VARIANTS = {
    "pictures": [],
    "stream": ["--streaming", "--shuffle_buffer=7"],
    "accumulated, with a worker": ["--gradient_accumulation_steps=2", "--num-workers=1"],
    "digits": [],
    "augmented": ["--augment", "--num-workers=1"],
    "before the first checkpoint but one": ["--save_every=50"],
    "some parameters had no gradient yet": ["--decoder_kwargs.layer_dropout=0.9"],
}


class Crash(BaseException):
    """An exception that nothing catches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", 22)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nothing has interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", f"--data={folder}", *SHORT, *DROPOUT, f"--run={run}"]) == 0
    return run


def test_a_build_for_cuda_without_a_device_has_random_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_device_module", lambda: torch.cuda)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    states = random_state()
    assert sorted(states) == ["python", "python.gauss", "torch"]
    drawn = torch.rand(3)
    set_random_state(states | {"device": torch.zeros(16, dtype=torch.uint8)})  # resumed without the device
    assert torch.equal(torch.rand(3), drawn)
    assert not torch.equal(torch.rand(3), drawn)


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int, how: Any) -> None:
    log = Run.log

    def log_or_crash(run: Run, **metrics: Any) -> None:
        if metrics["step"] == step and "loss" in metrics:
            how()
        log(run, **metrics)

    monkeypatch.setattr(Run, "log", log_or_crash)


def step_of(run: Path) -> int:
    with safetensors.safe_open(str(run / CHECKPOINT), "pt") as file:
        return int(json.loads(file.metadata()["state"])["progress"]["step"])


def crash() -> None:
    raise Crash


def crashes(arguments: list[str]) -> None:
    with pytest.raises(Crash):
        main(arguments)


OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
NO_GRADIENT = pytest.mark.skipif(OLD_TORCH, reason="torch 2.9 refuses to load an optimizer in which a state is missing")
SLOW = "augmented", "accumulated, with a worker", "before the first checkpoint but one"
MARKS = {variant: [pytest.mark.slow] for variant in SLOW} | {"some parameters had no gradient yet": [NO_GRADIENT]}


@pytest.mark.parametrize("variant", [pytest.param(variant, marks=MARKS.get(variant, [])) for variant in VARIANTS])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    variant: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data=digits"] if variant == "digits" else [f"--data={folder}", "--held_out=6"]
    train = ["train", *data, *(option for option in SHORT if option != "--held_out=6"), *DROPOUT, *VARIANTS[variant]]
    assert main([*train, f"--run={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        crash_at(patch, 6, crash)
        crashes([*train, f"--run={tmp_path / 'crashed'}"])
    crashed = [line["step"] for line in Run(tmp_path / "crashed").metrics()]
    assert crashed == [1, 2, 3, 3, 4, 5]
    shutil.copytree(tmp_path / "crashed", tmp_path / "other")

    assert main(["train", f"--resume={tmp_path / 'crashed'}"]) == 0
    whole = end_of(tmp_path / "whole")
    assert end_of(tmp_path / "crashed") == whole
    assert [line["step"] for line in whole["metrics"]] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 7]

    monkeypatch.setattr(checkpoint, "set_random_state", lambda states: None)
    assert main(["train", f"--resume={tmp_path / 'other'}"]) == 0
    drew_otherwise = end_of(tmp_path / "other")["model.safetensors"] != whole["model.safetensors"]
    assert drew_otherwise == ("--save_every=50" not in VARIANTS[variant])  # a run that starts again needs only the seed


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_signal_ends_the_training_after_the_step(
    number: signal.Signals,
    folder: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = ["train", f"--data={folder}", *SHORT, *DROPOUT]
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        crash_at(patch, 5, lambda: os.kill(os.getpid(), number))
        assert main([*train, f"--run={tmp_path / 'told'}"]) == 130
    assert signal.getsignal(number) == before
    assert [line["step"] for line in Run(tmp_path / "told").metrics()] == [1, 2, 3, 3, 4, 5]
    out = capsys.readouterr().out
    assert f"resume it: palme-xt train --resume {tmp_path / 'told'}" in out
    assert "5 steps; 16 training rows read; skipped: none" in out
    for _ in range(2):  # the second time, nothing is left to do
        assert main(["train", f"--resume={tmp_path / 'told'}"]) == 0
        assert end_of(tmp_path / "told") == end_of(whole)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_leaves_the_readers_to_the_training(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = [sys.executable, "-m", "palme_xt", "train", f"--data={folder}", *SHORT, "--steps=100000"]
    command = [*train, "--eval_every=100000", "--num_workers=2", f"--run={run}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert (run / "samples.png").exists()


def test_a_signal_told_twice_is_one_wish(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_the_job_and_by_the_launcher() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    crash_at(monkeypatch, 5, by_the_job_and_by_the_launcher)
    assert main(["train", f"--data={folder}", *SHORT, f"--run={tmp_path / 'run'}"]) == 130
    assert (tmp_path / "run" / "samples.png").exists()


def test_what_is_learned_is_saved_before_it_is_evaluated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train", f"--data={folder}", *SHORT, *DROPOUT, "--save_every=50", "--eval_every=50"]
    assert main([*train, f"--run={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        crash_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(training, "evaluate", lambda *arguments: crash())  # the launcher kills the process
        crashes([*train, f"--run={tmp_path / 'run'}"])
    assert step_of(tmp_path / "run") == 5
    assert main(["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")


def test_a_run_is_trained_by_one_process_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    resumed: list[subprocess.CompletedProcess[str]] = []

    def resume() -> None:
        command = [sys.executable, "-m", "palme_xt", "train", f"--resume={run}"]
        resumed.append(subprocess.run(command, capture_output=True, text=True))

    crash_at(monkeypatch, 5, resume)
    assert main(["train", f"--data={folder}", *SHORT, f"--run={run}"]) == 0
    explain(resumed[0], rf"{run} is being trained by another process: wait until it ends")
    assert not (run / LOCK).exists()
    monkeypatch.undo()
    assert main(["train", f"--resume={run}"]) == 0


def test_a_run_goes_on_with_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, run = write_folder(tmp_path / "data", 22), tmp_path / "run"
    train = ["train", "--data=data", *SHORT]
    assert main([*train, f"--run={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        crash_at(patch, 5, crash)
        crashes([*train, f"--run={run}"])
    shutil.copytree(run, tmp_path / "other")

    elsewhere = tmp_path / "elsewhere"
    data.rename(elsewhere)
    capsys.readouterr()
    fails(capsys, ["train", f"--resume={run}"], "data='data' does not exist: .*")
    assert main(["train", f"--resume={run}", f"--data={elsewhere}"]) == 0
    found, expected = end_of(run), end_of(tmp_path / "whole")
    assert found.pop("README.md") != expected.pop("README.md")  # it names the location of the data
    assert found == expected

    lines = (elsewhere / "metadata.jsonl").read_text().splitlines()
    changed = json.loads(lines[0]) | {"text": "another caption"}
    for content in [json.dumps(changed), *lines[1:]], lines[:-1]:
        (elsewhere / "metadata.jsonl").write_text("\n".join(content) + "\n")
        capsys.readouterr()
        message = r"data=\S+ differs from the data that \S+other started with, in its (rows|held_out)_fingerprint: .*"
        fails(capsys, ["train", f"--resume={tmp_path / 'other'}", f"--data={elsewhere}"], message)


def test_checkpoints_of_version_0_1_can_be_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train", f"--data={folder}", *SHORT]
    assert main([*train, f"--run={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        crash_at(patch, 6, crash)
        crashes([*train, f"--run={tmp_path / 'run'}"])
    path = tmp_path / "run" / CHECKPOINT
    with safetensors.safe_open(str(path), "pt") as file:
        state = json.loads(file.metadata()["state"])
    state["progress"]["metrics_size"] = 7
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"state": json.dumps(state)})
    assert main(["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")


def test_a_second_signal_ends_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("palme_xt.captioner.signals.GRACE_SECONDS", 0.0)
    crash_at(monkeypatch, 5, twice)
    assert main(["train", f"--data={folder}", *SHORT, f"--run={tmp_path / 'run'}"]) == 130
    assert [line["step"] for line in Run(tmp_path / "run").metrics()][-1] == 4
    assert not (tmp_path / "run" / "samples.png").exists()


@pytest.mark.slow
def test_runs_killed_at_20_random_moments_lose_nothing(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.captioner.training.killing", str(tmp_path), str(folder), "20"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["moments"] >= 6


def test_the_generators_go_on_where_they_were() -> None:
    import random

    def draw() -> tuple[float, float, float]:
        return random.random(), random.gauss(0, 1), float(torch.rand(()))

    draw()  # gauss draws two numbers and keeps one for the next call
    state = random_state()
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


def checkpoint_size(folder: Path, tmp_path: Path) -> int:
    assert main(["train", f"--data={folder}", *SHORT, "--steps=1", f"--run={tmp_path / 'size'}"]) == 0
    return (tmp_path / "size" / CHECKPOINT).stat().st_size


def explain(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1].rpartition("\r")[2]
    assert re.fullmatch(rf"palme-xt: error: {message}", last), last


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    kilobytes = int(1.6 * checkpoint_size(folder, tmp_path)) // 1024  # one checkpoint, but not two
    disk, run, copy = tmp_path / "disk", tmp_path / "disk" / "run", tmp_path / "copy"
    disk.mkdir()
    train = [sys.executable, "-m", "palme_xt", "train", f"--data={folder}", *SHORT, "--eval_every=90", f"--run={run}"]
    script = (
        f'mount -t tmpfs -o size={kilobytes}k none {disk} || exit 77; "$@"; code=$?; cp -r {run} {copy}; exit $code'
    )
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as this process: the gradients of layer norms depend on the number
    done = subprocess.run([*namespace, "sh", "-c", script, "sh", *train], capture_output=True, text=True, env=env)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this user may not mount a small disk")
    explain(done, rf"\S+{CHECKPOINT} cannot be written: .*No space left on device.*; saved files are unchanged")
    assert not (copy / UNFINISHED).exists()
    assert main(["train", f"--resume={copy}"]) == 0
    assert main(["train", f"--data={folder}", *SHORT, "--eval_every=90", f"--run={tmp_path / 'whole'}"]) == 0
    assert end_of(copy) == end_of(tmp_path / "whole")


def test_a_folder_that_becomes_read_only_leaves_the_last_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    unprivileged = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
    palme_xt = [*unprivileged, sys.executable, "-m", "palme_xt"]
    endless = ["train", f"--data={folder}", *SHORT, "--steps=100000", "--eval_every=100000", f"--run={run}"]
    try:
        with subprocess.Popen([*palme_xt, *endless], stderr=subprocess.PIPE, text=True) as process:
            while len(Run(run).metrics()) < 5:
                assert process.poll() is None
                time.sleep(0.01)
            run.chmod(0o500)
            _, err = process.communicate()
        done = subprocess.CompletedProcess(endless, process.returncode, "", err)
        message = "cannot be written: .*Permission denied.*; saved files are unchanged"
        explain(done, rf"\S+{CHECKPOINT} {message}")
        (run / LOCK).unlink(missing_ok=True)
        again = subprocess.run([*palme_xt, "train", f"--resume={run}"], capture_output=True, text=True)
        explain(again, rf"\S+{LOCK} cannot be written: Permission denied; saved files are unchanged")
    finally:
        run.chmod(0o700)
    step = step_of(run)
    crash_at(monkeypatch, step + 3, crash)
    crashes(["train", f"--resume={run}"])
    assert [line["step"] for line in Run(run).metrics()] == list(range(1, step + 3))


def test_a_loss_that_is_not_finite_keeps_the_last_good_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", f"--data={folder}", *SHORT, "--save_every=1"]
    with monkeypatch.context() as patch:
        crash_at(patch, 4, crash)  # after the checkpoint of step 3
        crashes([*train, f"--run={tmp_path / 'good'}"])
    forward = PalmE.forward
    calls = iter(range(1, 100))

    def poisoned(model: PalmE, img: torch.Tensor, text: torch.Tensor) -> Any:
        loss = forward(model, img, text)
        return loss * float("nan") if model.training and next(calls) == 5 else loss

    monkeypatch.setattr(PalmE, "forward", poisoned)
    capsys.readouterr()
    fails(
        capsys,
        [*train, f"--run={tmp_path / 'run'}"],
        r"lr=0.002 led to a loss of nan at step 5, batch \S+\.png, \S+\.png, \S+\.png, \S+\.png: lower it; \S+ keeps "
        "the last good weights, and metrics.jsonl lists all names",
    )
    last = Run(tmp_path / "run").metrics()[-1]
    assert (last["step"], last["loss"], len(last["batch"])) == (5, "nan", 4)
    # The weights are those of step 3, because the loss of the weights of step 4 was not finite.
    found, good = (safetensors.torch.load_file(tmp_path / name / CHECKPOINT) for name in ("run", "good"))
    assert good.keys() == found.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, good[name])] == []
    assert step_of(tmp_path / "run") == 3
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "good")]
    assert weights[0] == weights[1]
    monkeypatch.undo()
    assert main(["train", f"--resume={tmp_path / 'run'}"]) == 0
    after = safetensors.torch.load_file(tmp_path / "run" / CHECKPOINT)
    assert any(not torch.equal(tensor, good[name]) for name, tensor in after.items())


def test_weights_that_explode_are_not_saved(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train = ["train", f"--data={folder}", *SHORT, "--save_every=1", "--lr=1e30", "--grad_clip=1e30"]
    fails(capsys, [*train, f"--run={run}"], r"lr=1e\+30 led to a (loss|gradient norm) of (nan|inf) at step 2, .*")
    assert step_of(run) == 0


def test_runs_that_cannot_be_resumed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", f"--data={folder}", *SHORT, "--steps=2", f"--run={run}"]) == 0
    good, config = (run / CHECKPOINT).read_bytes(), (run / "config.json").read_text()
    capsys.readouterr()
    resume = ["train", f"--resume={run}"]
    fails(capsys, ["train", "--resume=nowhere"], r"nowhere is not a run folder: there is no such folder; .*")
    for steps in 9, 500:  # also the default
        others = [f"--steps={steps}", "--lr=1", "--decoder_kwargs.ff_glu=true", "--data=x"]
        message = r"--resume=\S+ allows no other options except --data --steps --patience --device, found --lr .*"
        fails(capsys, [*resume, *others], message)
    (run / CHECKPOINT).write_bytes(good[:-9])
    fails(capsys, resume, rf"\S+{CHECKPOINT} cannot be read as a checkpoint: .*")
    (run / CHECKPOINT).write_bytes((run / "model.safetensors").read_bytes())
    fails(capsys, resume, rf"\S+{CHECKPOINT} cannot be read as a checkpoint: .*")
    (run / CHECKPOINT).write_bytes(good)
    (run / "config.json").write_text(config.replace('"decoder_dim": 16', '"decoder_dim": 24'))
    fails(capsys, resume, rf"\S+{CHECKPOINT} does not belong to this model: .*")
    (run / "config.json").write_text(config.replace('"lr"', '"learning_rate"'))
    fails(capsys, resume, r"\S+ does not say how it was trained: 'lr' is missing in config.json")
    (run / "config.json").write_text(re.sub('"lr": [^,]*', '"lr": "high"', config))
    fails(capsys, resume, "lr='high' must be of type float")
    (run / "config.json").write_text(config)
    folder.rename(tmp_path / "moved")
    try:
        fails(capsys, resume, r"data='\S+pictures' does not exist: .*")
    finally:
        (tmp_path / "moved").rename(folder)
    assert main(resume) == 0


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train", f"--data={folder}", *SHORT, "--steps=3"]
    assert main([*train, f"--run={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *arguments: crash())
        crashes([*train, f"--run={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / CHECKPOINT).exists()
    assert main(["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")
