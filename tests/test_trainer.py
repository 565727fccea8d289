"""`Trainer` of Hugging Face's transformers trains, evaluates, saves and resumes a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from palme_xt import PalmE
from tests.models import batch, small

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers' own, many


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    stacked = {name: torch.stack([row[name] for row in rows]) for name in ("img", "text")}
    return {**stacked, "return_outputs": True}


def trainer(model: PalmE, folder: Path, **arguments: Any) -> Any:
    rows = [{"img": img, "text": text, "unused": "removed"} for img, text in zip(*batch(model, b=8), strict=True)]
    settings = {"save_steps": 2, "eval_strategy": "epoch", "label_names": ["text"], "prediction_loss_only": True}
    settings |= {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "report_to": "none"}
    how = transformers.TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **settings | arguments)
    return transformers.Trainer(model, how, train_dataset=rows, eval_dataset=rows, data_collator=collate)


def test_it_trains_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    model = small()
    before = model(*batch(model, b=8)).item()
    training = trainer(model, tmp_path, gradient_accumulation_steps=2)
    training.train()
    model.eval()
    loss = model(*batch(model, b=8))
    assert loss < before
    assert training.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert training.state.log_history[0]["eval_loss"] != pytest.approx(loss.item(), rel=1e-5)

    again = small(seed=3)
    again.load_state_dict(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    resumed = small(seed=4)
    trainer(resumed, tmp_path, gradient_accumulation_steps=2).train(str(tmp_path / "checkpoint-2"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(resumed.state_dict()[name], value), name


def test_its_logs_hold_the_config(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = small()
    trainer(model, tmp_path, report_to="tensorboard").train()
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out*"))
    assert b"decoder_heads" in events


def test_a_model_of_the_hub_saves_what_can_be_loaded(tmp_path: Path) -> None:
    from palme_xt import hub

    model = hub.PalmE.from_config(small().config)
    trainer(model, tmp_path / "training", save_strategy="no").train()
    model.save_pretrained(tmp_path / "saved")
    loaded = hub.PalmE.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(*batch(model)), model.eval()(*batch(model)))
