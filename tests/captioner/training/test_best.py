"""A run keeps its best weights, goes on from its last ones, and can be trained longer or be the start of another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tqdm import tqdm

from palme_xt.captioner import Captioner
from palme_xt.captioner.training import checkpoint, loop
from palme_xt.captioner.training.checkpoint import CHECKPOINT, warm_up_and_decay
from palme_xt.captioner.training.evaluate import evaluate
from palme_xt.captioner.training.run import EVALUATION, METRICS, Run
from palme_xt.cli import main
from palme_xt.storage.folder import read_config
from tests.captioner.captioned import TINY, write_folder
from tests.captioner.training.killing import end_of
from tests.captioner.training.test_resume import SHORT, crash, crash_at, crashes, step_of
from tests.test_cli import fails

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", 22)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> dict[int, Weights]:
    """Let the held-out loss fall until step 3 and rise after it; return the weights at each evaluation."""
    weights: dict[int, Weights] = {}

    def scripted(task: Any, accelerator: Any, model: torch.nn.Module, step: int, batch_size: int) -> Any:
        weights[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        evaluation = evaluate(task, accelerator, model, step, batch_size)  # type: ignore[arg-type]
        return evaluation._replace(loss=1 + abs(step - 3) / 10)

    monkeypatch.setattr(loop, "evaluate", scripted)
    return weights


def saved(run: Path) -> Weights:
    return safetensors.torch.load_file(run / "model.safetensors")


def last(run: Path) -> Weights:
    tensors = safetensors.torch.load_file(run / CHECKPOINT)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


def same(ours: Weights, theirs: Weights) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def steps_of(run: Path) -> Sequence[int]:
    return [line["step"] for line in Run(run).metrics() if "loss" in line]


def test_the_best_weights_are_saved_and_the_last_ones_resumed(
    folder: Path, tmp_path: Path, evaluated: dict[int, Weights], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", f"--data={folder}", *SHORT, f"--run={run}"]) == 0
    assert sorted(evaluated) == [3, 6, 7]
    assert same(saved(run), evaluated[3])
    assert same(last(run), evaluated[7])
    assert not same(evaluated[3], evaluated[7])
    out = capsys.readouterr().out
    assert "these are the results of the weights of step 3, which have the lowest held-out loss and are saved\n" in out
    assert "loss 1.000 nats per token" in out
    evaluation = json.loads((run / EVALUATION).read_text())
    assert (evaluation["step"], evaluation["loss"], len(evaluation["predicted"])) == (3, 1.0, 6)
    card = (run / "README.md").read_text()
    for line in (
        "| step | 3 |",
        "| selected_by | lowest held-out loss |",
        "| held_out_chrf | ",
        "| held_out_loss | 1.0 |",
    ):
        assert line in card
    # The predictions are those of the saved weights.
    captioner = Captioner.from_pretrained(run)
    assert captioner(sorted((run / "held_out").glob("*.png"))) == evaluation["predicted"]

    before = end_of(run)
    assert main(["train", f"--resume={run}"]) == 0  # nothing is left to do
    assert end_of(run) == before


@pytest.mark.slow
def test_patience_ends_training_and_survives_a_crash(
    folder: Path,
    tmp_path: Path,
    evaluated: dict[int, Weights],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = ["train", f"--data={folder}", *SHORT, "--steps=50", "--eval_every=1", "--patience=3"]
    assert main([*train, f"--run={tmp_path / 'whole'}"]) == 0
    assert steps_of(tmp_path / "whole") == [1, 2, 3, 4, 5, 6]
    assert same(saved(tmp_path / "whole"), evaluated[3])
    message = "stopped before step 50: the last evaluations (--patience) did not lower the held-out loss"
    assert message in capsys.readouterr().out
    with monkeypatch.context() as patch:
        crash_at(patch, 6, crash)
        crashes([*train, f"--run={tmp_path / 'crashed'}"])
    for _ in range(2):  # the second time, nothing is left to do
        assert main(["train", f"--resume={tmp_path / 'crashed'}"]) == 0
        assert end_of(tmp_path / "crashed") == end_of(tmp_path / "whole")
    assert main(["train", f"--resume={tmp_path / 'crashed'}", "--patience=5"]) == 0
    assert steps_of(tmp_path / "crashed") == list(range(1, 9))


def test_a_run_can_be_trained_longer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, train = tmp_path / "run", ["train", f"--data={folder}", *SHORT]
    assert main([*train, f"--run={run}"]) == 0
    shutil.copytree(run, tmp_path / "cut")
    seven_steps = last(run)
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def recorded(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    monkeypatch.setattr("torch.optim.AdamW.step", recorded)
    assert main(["train", f"--resume={tmp_path / 'cut'}", "--steps=12"]) == 0
    # While the state of the optimizer is loaded, torch makes a step with a learning rate of 0.
    assert [rate for rate in rates if rate] == [0.002 * warm_up_and_decay(step, 12) for step in range(7, 12)]
    monkeypatch.undo()

    with monkeypatch.context() as patch:
        crash_at(patch, 11, crash)
        crashes(["train", f"--resume={run}", "--steps=12"])
    assert main(["train", f"--resume={run}"]) == 0  # it still has 12 steps
    assert steps_of(run) == list(range(1, 13))
    assert Run(run).training()["steps"] == 12
    assert same(last(run), last(tmp_path / "cut"))  # which was not interrupted
    assert not same(last(run), seven_steps)
    capsys.readouterr()
    fails(capsys, ["train", f"--resume={run}", "--steps=9"], r"steps=9 must be at least 12, the number that .*")
    assert Run(run).training()["steps"] == 12


def test_a_run_can_begin_with_the_weights_of_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train = ["train", f"--data={folder}", *SHORT]
    assert main([*train, "--encoder_dim=24", f"--run={first}"]) == 0
    start = ["train", f"--from={first}", f"--data={folder}", "--batch_size=4", "--lr=1e-9", "--weight_decay=0"]
    start += ["--held_out=6", "--eval_images=6", "--num_workers=0", "--steps=3"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *arguments: crash())
        crashes([*start, f"--run={second}"])
    assert not (second / CHECKPOINT).exists()
    assert main(["train", f"--resume={second}"]) == 0
    assert read_config(second) == read_config(first)
    assert Run(second).training()["start"] == str(first)
    assert f"| start | {first} |" in (second / "README.md").read_text()
    for name, tensor in last(second).items():
        torch.testing.assert_close(tensor, saved(first)[name], atol=1e-6, rtol=0)
    assert not same(last(second), saved(first))
    first.rename(tmp_path / "moved")
    assert main(["train", f"--resume={second}", "--steps=4"]) == 0  # its checkpoint has all that it needs

    capsys.readouterr()
    fails(capsys, [*start[:1], f"--from={first}"], r"\S+first is not a run folder: there is no such folder; .*")
    other = ["train", f"--from={tmp_path / 'moved'}", f"--data={folder}", f"--run={tmp_path / 'other'}"]
    fails(capsys, [*other, "--tokenizer=x.json"], r"--from=\S+ keeps the tokenizer of its run: leave --tokenizer out")
    fails(capsys, [*other, "--decoder_dim=24"], r"\S+moved/model.safetensors does not hold this model's weights: .*")


@pytest.mark.slow
def test_a_run_that_was_never_evaluated_has_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, image = tmp_path / "run", str(folder / "000.png")
    train = ["train", f"--data={folder}", *SHORT, "--eval_every=50"]
    with monkeypatch.context() as patch:
        crash_at(patch, 2, crash)
        crashes([*train, f"--run={run}"])
    capsys.readouterr()
    message = r"\S+run has no weights yet: resume its training with `palme-xt train --resume \S+run`"
    fails(capsys, ["caption", str(run), image], message)
    with monkeypatch.context() as patch:
        crash_at(patch, 6, crash)
        crashes(["train", f"--resume={run}"])
    assert step_of(run) == 4
    assert same(saved(run), last(run))
    assert main(["caption", str(run), image]) == 0
    assert "| selected_by | last checkpoint |" in (run / "README.md").read_text()
    assert main(["train", f"--resume={run}"]) == 0
    assert main([*train, f"--run={tmp_path / 'whole'}"]) == 0
    assert end_of(run) == end_of(tmp_path / "whole")


@pytest.mark.slow
def test_runs_of_version_0_2_can_be_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ["train", f"--data={folder}", *SHORT]
    assert main([*train, f"--run={tmp_path / 'whole'}"]) == 0
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_at(patch, 6, crash)
        crashes([*train, f"--run={run}"])
    values = json.loads((run / "config.json").read_text())
    for name in "augment", "patience":
        del values["training"][name]
    (run / "config.json").write_text(json.dumps(values))
    (run / EVALUATION).unlink()
    assert main(["train", f"--resume={run}"]) == 0
    assert same(saved(run), saved(tmp_path / "whole"))
    assert (run / METRICS).exists()


def test_the_time_left_counts_evaluations(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    def watched(**how: Any) -> Any:
        bars.append(tqdm(**how))
        return bars[-1]

    monkeypatch.setattr(loop, "tqdm", watched)
    assert main(["train", f"--data={folder}", *SHORT, f"--run={tmp_path / 'run'}"]) == 0
    (bar,) = bars
    assert bar.smoothing == 0  # the mean over all time, including that of evaluations
    assert bar.n == bar.total == 7


def test_augmentation_of_scenes_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "augment=True has no effect with data=digits, whose scenes are composed: use jitter"
    fails(capsys, ["train", "--augment", *TINY, f"--run={tmp_path / 'run'}"], message)


@pytest.mark.slow
def test_augmentation_changes_what_is_trained(folder: Path, tmp_path: Path) -> None:
    weights = []
    for name, option in (
        ("plain", []),
        ("augmented", ["--augment"]),
        ("with a reader", ["--augment", "--num_workers=1"]),
    ):
        assert main(["train", f"--data={folder}", *SHORT, "--eval_every=9", *option, f"--run={tmp_path / name}"]) == 0
        weights.append(last(tmp_path / name))
    assert not same(weights[0], weights[1])
    assert same(weights[1], weights[2])
