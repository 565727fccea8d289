"""A run folder: what training leaves behind, and what captioning reads.

config.json        the model's arguments, and under "training" how it was trained
model.safetensors  the weights
metrics.jsonl      a line for each logged step and each evaluation
samples.png        held-out images with their generated captions
loss.png           the loss curve
parity.safetensors what `palme-xt parity record` has written
held_out/*.png     some of the held-out images, to caption
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from palme_xt.config import PalmEConfig
from palme_xt.model import PalmE

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PARITY = "parity.safetensors"
METRICS = "metrics.jsonl"


class RunError(ValueError):
    """A folder that cannot be written as a run, or read as one."""


class Run:
    """The files of one training run, below `folder`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def create(self, config: PalmEConfig, training: dict[str, Any]) -> None:
        """Make the folder and write `config.json`.

        Raises:
            RunError: the folder is there already and not empty, or cannot be made.
        """
        try:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise RunError(f"{self.folder} is not empty: name another folder, or remove it first")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write(CONFIG, json.dumps(config.to_dict() | {"training": training}, indent=2).encode() + b"\n")
        except OSError as error:
            raise RunError(f"{self.folder} cannot be a run folder: {error.strerror}") from error

    def save(self, model: PalmE) -> None:
        """Write the weights."""
        self.write(WEIGHTS, safetensors.torch.save(model.state_dict()))

    def log(self, **metrics: Any) -> None:
        """Append a line to `metrics.jsonl`."""
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        path = self.folder / METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def config(self) -> PalmEConfig:
        """The arguments of the model.

        Raises:
            RunError: not a run folder, or one whose `config.json` holds no model's arguments.
        """
        for name in CONFIG, WEIGHTS:
            if not (self.folder / name).is_file():
                raise RunError(f"{self.folder} is not a run folder: it has no {name}; `palme-xt train` makes one")
        try:
            values = json.loads((self.folder / CONFIG).read_text())
            if not isinstance(values, dict):
                raise TypeError(f"it holds a {type(values).__name__}, must hold an object")
            values.pop("training", None)
            return PalmEConfig.from_dict(values)
        except (ValueError, TypeError) as error:
            raise RunError(f"{self.folder / CONFIG} does not hold a model's arguments: {error}") from error

    def load(self, device: str | torch.device = "cpu") -> PalmE:
        """The trained model, in eval mode.

        Raises:
            RunError: not a run folder, or one whose files are damaged or do not belong together.
        """
        model = PalmE.from_config(self.config()).to(device)
        try:
            safetensors.torch.load_model(model, str(self.folder / WEIGHTS), device=str(device))
        except (safetensors.SafetensorError, RuntimeError) as error:
            found = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
            raise RunError(f"{self.folder / WEIGHTS} does not hold this model's weights: {found}") from error
        return model.eval()

    def write(self, name: str, content: bytes) -> None:
        """Write a file; whoever reads at the same time finds the old one or the new one, never a part."""
        new = self.folder / (name + ".new")
        new.write_bytes(content)
        new.replace(self.folder / name)
