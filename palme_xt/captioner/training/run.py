"""A run folder: what training leaves behind, what captioning reads, and what the hub stores.

config.json               the model's arguments, and under "training" how it was trained
model.safetensors         the weights of the last evaluation
preprocessor_config.json  how pictures are resized, cropped and normalised
tokenizer.json            the vocabulary, with tokenizer_config.json; neither is there for bytes
README.md                 a model card
checkpoint.safetensors    everything that resuming needs
metrics.jsonl             a line for each step and each evaluation
samples.png               held-out images with their generated captions
loss.png                  the loss curve
parity.safetensors        what `palme-xt parity record` has written
held_out/*.png            some of the held-out images, to caption
logs/                     what trackers write
training.lock             while it is trained
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from palme_xt.config import PalmEConfig
from palme_xt.model import PalmE
from palme_xt.storage import folder as pretrained
from palme_xt.storage.atomic import sync
from palme_xt.storage.folder import CONFIG, WEIGHTS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARITY = "parity.safetensors"
METRICS = "metrics.jsonl"
UNFINISHED = "unfinished"
LOCK = "training.lock"

__all__ = ["CONFIG", "METRICS", "PARITY", "WEIGHTS", "Run", "RunError"]


class RunError(ValueError):
    """A folder that cannot be written as a run, or read as one."""


class Run:
    """The files of one training run, below `folder`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._lock: IO[bytes] | None = None

    def create(
        self, config: PalmEConfig, training: Mapping[str, Any], companions: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        """Make the folder and write `companions`, then `config.json`, which makes it a run.

        Raises:
            RunError: the folder is there already and not empty, or cannot be made.
        """
        try:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise RunError(
                    f"{self.folder} is not empty: name another folder, or remove it first; a run goes on with "
                    f"`palme-xt train --resume {self.folder}`"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.folder} cannot be a run folder: {error.strerror}") from error
        for name, content in companions.items():
            self.write(name, content)
        self.write(CONFIG, json.dumps(config.to_dict() | {"training": dict(training)}, indent=2).encode() + b"\n")

    def lock(self) -> None:
        """Keep other processes from training this run until `unlock`, or until this process has ended, however.

        Raises:
            RunError: another process trains it, or the folder cannot be written.
        """
        try:
            file = open(self.folder / LOCK, "wb")  # noqa: SIM115  # open until `unlock`
        except OSError as error:
            raise RunError(f"{self.folder / LOCK} cannot be written: {error.strerror}") from error
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked readers would hold on to
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise RunError(f"{self.folder} is being trained by another process: wait for its end") from error
        except OSError:  # a file system without locks
            pass
        self._lock = file

    def unlock(self) -> None:
        """The reverse of `lock`."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.folder / LOCK).unlink()
            self._lock.close()
            self._lock = None

    def save(self, state_dict: Mapping[str, Tensor]) -> None:
        """Write the weights."""
        self.write_tensors(WEIGHTS, state_dict)

    def log(self, **metrics: Any) -> None:
        """Append a line to `metrics.jsonl`; what is not finite becomes a string, which JSON has."""
        values = {name: _finite_or_string(value) for name, value in metrics.items()}
        try:
            with open(self.folder / METRICS, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise RunError(f"{self.folder / METRICS} cannot be written: {error.strerror}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        path = self.folder / METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def metrics_size(self) -> int:
        """Bytes of `metrics.jsonl` that are on the disk."""
        path = self.folder / METRICS
        if not path.exists():
            return 0
        sync(path)
        return path.stat().st_size

    def forget_metrics_after(self, size: int) -> None:
        """Cut `metrics.jsonl` to its first `size` bytes."""
        path = self.folder / METRICS
        if path.exists():
            os.truncate(path, min(size, path.stat().st_size))

    def config(self) -> PalmEConfig:
        """The arguments of the model.

        Raises:
            FolderError: not a run folder, or one whose `config.json` holds no model's arguments.
        """
        return pretrained.read_config(self.folder)

    def training(self) -> dict[str, Any]:
        """How it was trained, as `create` was told.

        Raises:
            FolderError: as `config`.
        """
        training = pretrained.read_json(self.folder).get("training", {})
        return training if isinstance(training, dict) else {}

    def load(self, device: str | torch.device = "cpu") -> PalmE:
        """The trained model, in eval mode.

        Raises:
            FolderError: not a run folder, or one whose files are damaged or do not belong together.
        """
        return pretrained.load(self.folder, device)

    def write(self, name: str, content: bytes) -> None:
        """Write a file; whoever reads at the same time finds the old one or the new one, never a part.

        Raises:
            RunError: it cannot be written; the old one is as it was.
        """
        self._replace(name, lambda path: path.write_bytes(content))

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file, as `write`.

        Raises:
            RunError: as `write`.
        """
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self._replace(name, lambda path: safetensors.torch.save_file(contiguous, path, dict(metadata or {})))

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        # A folder, because safetensors writes to a file of its own choice beside the one that it is told: whatever is
        # left of an interrupted write goes with the folder at the next.
        aside = self.folder / UNFINISHED
        new = aside / name
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            write(new)
            new.chmod(0o666 & ~_umask())  # safetensors 0.8 lets the owner alone read what it writes
            # On the disk before the name points to it: a power failure leaves the old file or the new one, too.
            sync(new)
            new.replace(self.folder / name)
            aside.rmdir()
            if os.name == "posix":
                sync(self.folder)
        except (OSError, safetensors.SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RunError(
                f"{self.folder / name} cannot be written: {reason}; what was there before is as it was"
            ) from error


def _umask() -> int:
    """The mode bits that this process denies; setting them is the only way to read them."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _finite_or_string(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value - value != 0 else value
