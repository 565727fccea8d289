"""The files of a run folder: how they are written, and what is read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palme_xt.captioner.training.run import METRICS, Run
from palme_xt.storage.folder import WEIGHTS, FolderError, as_safetensors
from tests.models import small


def test_metrics_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = Run(tmp_path / "whole"), Run(tmp_path / "resumed")
    for run in whole, resumed:
        run.create(small().config, {}, {})
        run.log(step=1, loss=3.0)
        run.log(step=2, loss=2.0)
        run.log(step=2, held_out_loss=2.5)
    expected = whole.metrics()
    assert [(line["step"], "loss" in line) for line in expected] == [(1, True), (2, True), (2, False)]

    resumed.log(step=3, loss=9.0)
    resumed.log(step=4, loss=9.0)
    resumed.log(step=3, loss=1.0)  # from a checkpoint of step 2
    resumed.log(step=3, held_out_loss=1.5, interrupted=True)
    assert [line.get("loss") for line in resumed.metrics()] == [3.0, 2.0, None, 1.0, None]
    resumed.log(step=4, loss=0.5)
    for step, loss in (3, 1.0), (4, 0.5):
        whole.log(step=step, loss=loss)
    for run in whole, resumed:
        run.log(step=4, held_out_loss=0.7)
    resumed.log(step=4, held_out_loss=0.7)  # resumed with nothing left to do
    assert resumed.metrics() == whole.metrics()
    assert [line["step"] for line in whole.metrics()] == [1, 2, 2, 3, 4, 4]


def test_an_evaluation_that_was_due_survives_an_interrupt_at_the_same_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log(step=1, loss=3.0)
    run.log(step=1, held_out_loss=2.5)
    before = run.metrics()
    run.log(step=1, held_out_loss=2.5, interrupted=True)
    run.log(step=2, loss=2.0)
    assert run.metrics() == [*before, {"step": 2, "loss": 2.0}]


def test_a_line_that_a_crash_cut_short_is_skipped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.metrics() == []
    lines: list[dict[str, Any]] = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": "nan", "batch": ['{"step": 7']}]
    for line in lines:
        run.log(**line)
    content = (tmp_path / METRICS).read_text()
    for end in range(len(content) + 1):
        (tmp_path / METRICS).write_text(content[:end])
        written = run.metrics()
        assert written == lines[: len(written)]
        run.log(step=3, loss=1.0)
        assert run.metrics() == [*written, {"step": 3, "loss": 1.0}], content[:end]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path / "nowhere")
    message = r"nowhere/{} cannot be written: No such file or directory; saved files are unchanged"
    for name, write in {
        "README.md": lambda: run.write({"README.md": b""}),
        "model.safetensors": lambda: run.write({WEIGHTS: as_safetensors(small().state_dict())}),
        "metrics.jsonl": lambda: run.log(step=1),
        "training.lock": run.lock,
    }.items():
        with pytest.raises(FolderError, match=message.format(name)):
            write()
